"""Modules as their packages publish them, none of them changed. Each test is skipped where its package is missing.

The identity that holds for every module without knowing it: inputs that occur twice double the rows, of which one half
repeats the other. The rank stays as it is, and as many outputs as there were inputs are duplicated.
"""

import math

import pytest
from torch import nn

from lightning_basin import BasinMonitor, measure_basin
from tests.lightning_packages import MisconfigurationException
from tests.published.modules import ARGUMENTS, PACKAGES
from tests.training import fingerprint, seeded, steps

pytestmark = pytest.mark.fits

pytestmark = [pytest.mark.fits, pytest.mark.filterwarnings("ignore")]

IMPORTED = {"pytorch-forecasting": "pytorch_forecasting", "scvi-tools": "scvi"}


def fit(package, name, *callbacks):
    pytest.importorskip(IMPORTED.get(package, package))
    with seeded(3):
        return PACKAGES[package][1]()[name](list(callbacks))


def check(package, name, behavior, *, wrap=lambda module: module, **options):
    """A run is as without monitor, measured at the end of each epoch, and its ranks obey the identity above."""
    monitor = BasinMonitor(hessian=False, behavior=behavior, **options)
    module = fit(package, name, monitor)
    assert fingerprint(module.state_dict()) == fingerprint(fit(package, name).state_dict())
    last = monitor.records[-1].step
    assert steps(monitor) == [0, last // 2, last]
    doubled = monitor.probe.select([*range(monitor.probe.size)] * 2)
    twice = measure_basin(wrap(module), doubled, behavior=behavior, hessian=False)
    assert twice.gradient_rank == monitor.records[-1].gradient_rank > 0
    once = monitor.records[-1].output_duplicated_activations
    assert twice.output_duplicated_activations == once + monitor.probe.size
    return monitor


# transformers


def logits(module, batch):
    return module(**batch).logits


@pytest.mark.parametrize(
    ("name", "probe", "num_rows"), [("BERT", 16, 16 * 3), ("GPT-2", 8, 8 * 4 * 12), ("Llama", 8, 8 * 4 * 12)]
)
def test_model_of_transformers_is_measured_by_its_logits(name, probe, num_rows):
    monitor = check("transformers", name, logits, probe=probe)
    assert monitor.records[0].num_rows == num_rows


def test_classifier_of_transformers_has_a_hessian_with_its_labels_named():
    monitor = BasinMonitor(
        probe=16,
        behavior=logits,
        batch_fn=lambda batch: ({name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"]),
        loss_fn=nn.functional.cross_entropy,
    )
    fit("transformers", "BERT", monitor)
    baseline = monitor.records[0]
    assert baseline.loss == pytest.approx(math.log(3), abs=0.1)  # Weights of 0.02 tell three classes nothing.
    # Centred logits: a class less on each input (docs/classification.md).
    assert baseline.gauss_newton_nullity == baseline.num_parameters - 16 * 2
    assert baseline.hessian_nullity_lower <= baseline.hessian_nullity_upper


def test_module_of_transformers_is_measured_without_arguments():
    plain, told = BasinMonitor(16), BasinMonitor(16, behavior=logits)
    for monitor in (plain, told):
        fit("transformers", "BERT", monitor)
    assert [r.gradient_rank for r in plain.records] == [r.gradient_rank for r in told.records]
    assert all(record.loss is not None and record.hessian_nullity_lower is not None for record in plain.records)


# pytorch-forecasting


@pytest.mark.parametrize(("name", "num_outputs"), [("NBeats", 2), ("TemporalFusionTransformer", 2 * 7)])
def test_forecaster_is_measured_by_its_prediction(name, num_outputs):
    monitor = check("pytorch-forecasting", name, lambda module, inputs: module(inputs).prediction, probe=16)
    assert monitor.records[0].num_rows == 16 * num_outputs


def test_forecaster_is_measured_without_arguments():
    monitor = BasinMonitor(16)
    module = fit("pytorch-forecasting", "NBeats", monitor)
    assert fingerprint(module.state_dict()) == fingerprint(fit("pytorch-forecasting", "NBeats").state_dict())
    assert all(record.gradient_rank > 0 for record in monitor.records)


# chemprop


def test_message_passing_on_graphs_is_measured_by_indices():
    pytest.importorskip("chemprop")
    arguments = ARGUMENTS["chemprop"][1]()
    monitor = check("chemprop", "MPNN (regression)", **arguments)
    # Its criterion is found, and is the mean squared error of the targets given here.
    module, (indices, targets) = fit("chemprop", "MPNN (regression)"), arguments["probe"]
    expected = nn.functional.mse_loss(arguments["behavior"](module.eval(), indices), targets).item()
    assert monitor.records[-1].loss == pytest.approx(expected, rel=1e-5)


def test_message_passing_on_batches_says_that_graphs_go_by_indices():
    monitor = BasinMonitor(probe=16, behavior=lambda module, batch: module(batch.bmg, batch.V_d, batch.X_d))
    with pytest.raises(MisconfigurationException, match="indices of a data set as inputs"):
        fit("chemprop", "MPNN (regression)", monitor)


# scvi-tools


class Plan(nn.Module):
    """What scvi-tools trains: a module around the one that its model keeps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_training_plan_of_scvi_needs_an_output_without_sampling():
    monitor = check("scvi-tools", "SCVI", wrap=Plan, **ARGUMENTS["scvi-tools"][1]())
    assert monitor.records[-1].num_rows == 16 * 2


def test_training_plan_of_scvi_that_samples_is_refused():
    def rates(plan, batch):
        return plan.module(batch, compute_loss=False)[1]["px"].mean

    with pytest.raises(MisconfigurationException, match="the module draws random numbers in evaluation mode"):
        fit("scvi-tools", "SCVI", BasinMonitor(probe=16, behavior=rates))
