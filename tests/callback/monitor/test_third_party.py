"""Modules as their packages publish them, none of them changed. Each test is skipped where its package is missing.

The identity that holds for every module without knowing it: inputs that occur twice double the rows, of which one half
repeats the other. The rank stays as it is, and so many outputs are duplicated.
"""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_basin import BasinMonitor, Probe, measure_basin
from tests.lightning_packages import LightningModule, MisconfigurationException
from tests.training import fingerprint, make_trainer, seeded, steps

pytestmark = pytest.mark.fits

pytestmark = [pytest.mark.fits, pytest.mark.filterwarnings("ignore")]


def fit(root, make_module, make_loader, *callbacks):
    with seeded(3):
        module = make_module()
        trainer = make_trainer(root, *callbacks, max_epochs=2)
        trainer.fit(module, make_loader())
    return trainer, module


def check(root, make_module, make_loader, **options):
    """A run is as without monitor, measured at the end of each epoch, and its ranks obey the identity above."""
    monitor = BasinMonitor(hessian=False, **options)
    trainer, module = fit(root, make_module, make_loader, monitor)
    _, other = fit(root, make_module, make_loader)
    assert fingerprint(module.state_dict()) == fingerprint(other.state_dict())
    assert steps(monitor) == [0, trainer.global_step // 2, trainer.global_step]
    check_doubled(module, monitor.probe, options["behavior"], monitor.records[-1])
    return monitor


def check_doubled(module, probe, behavior, record):
    doubled = probe.select([*range(probe.size)] * 2)
    twice = measure_basin(module, doubled, behavior=behavior, hessian=False)
    assert twice.gradient_rank == record.gradient_rank > 0
    once = record.output_duplicated_activations
    assert twice.output_duplicated_activations == once + probe.size


def refused(root, make_module, make_loader, message, **options):
    with pytest.raises(MisconfigurationException, match=message):
        fit(root, make_module, make_loader, BasinMonitor(probe=16, **options))


class Wrapped(LightningModule):
    """What one finds in most repositories that train a model of transformers with Lightning."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        loss = self(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def classifier():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **sizes)
    return Wrapped(transformers.BertForSequenceClassification(config))


def language_model(family):
    transformers = pytest.importorskip("transformers")
    tokens = {"vocab_size": 12, "bos_token_id": 0, "eos_token_id": 1}
    if family == "GPT2":
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, **tokens)
        return Wrapped(transformers.GPT2LMHeadModel(config))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return Wrapped(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(max_position_embeddings=8, **sizes, **tokens))
    )


def token_batches(*, of_sentences):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for index in range(16):
        tokens = torch.randint(2, 12, (4,), generator=generator)
        mask = (torch.arange(4) < 3 + index % 2).long()
        labels = torch.tensor(index % 3) if of_sentences else tokens
        examples.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return DataLoader(examples, batch_size=8)


def logits(module, batch):
    return module(**batch).logits


def test_classifier_of_transformers_needs_its_logits_named(tmp_path):
    monitor = check(tmp_path, classifier, lambda: token_batches(of_sentences=True), probe=16, behavior=logits)
    assert monitor.records[0].num_rows == 16 * 3


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_language_model_of_transformers_needs_its_logits_named(tmp_path, family):
    monitor = check(
        tmp_path, lambda: language_model(family), lambda: token_batches(of_sentences=False), probe=8, behavior=logits
    )
    assert monitor.records[0].num_rows == 8 * 4 * 12


def test_classifier_of_transformers_has_a_hessian_with_its_labels_named(tmp_path):
    monitor = BasinMonitor(
        probe=16,
        behavior=logits,
        batch_fn=lambda batch: ({name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"]),
        loss_fn=nn.functional.cross_entropy,
    )
    fit(tmp_path, classifier, lambda: token_batches(of_sentences=True), monitor)
    baseline = monitor.records[0]
    assert baseline.loss == pytest.approx(math.log(3), abs=0.1)  # Weights of 0.02 tell three classes nothing.
    # Centred logits: a class less on each input (docs/classification.md).
    assert baseline.gauss_newton_nullity == baseline.num_parameters - 16 * 2
    assert baseline.hessian_nullity_lower <= baseline.hessian_nullity_upper


def test_module_of_transformers_is_measured_without_arguments(tmp_path):
    batches = lambda: token_batches(of_sentences=True)  # noqa: E731
    plain, told = BasinMonitor(16), BasinMonitor(16, behavior=lambda module, batch: module(**batch).logits)
    for monitor in (plain, told):
        fit(tmp_path, classifier, batches, monitor)
    assert [r.gradient_rank for r in plain.records] == [r.gradient_rank for r in told.records]
    assert all(record.loss is not None and record.hessian_nullity_lower is not None for record in plain.records)


def series():
    forecasting, pandas = pytest.importorskip("pytorch_forecasting"), pytest.importorskip("pandas")
    rows = [
        {"series": str(series), "time": time, "value": math.sin(time / 3 + series) + 0.1 * ((7 * time) % 5)}
        for series in range(4)
        for time in range(16)
    ]
    return forecasting.TimeSeriesDataSet(
        pandas.DataFrame(rows),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=6,
        max_prediction_length=2,
        time_varying_unknown_reals=["value"],
    )


def forecaster(kind):
    forecasting = pytest.importorskip("pytorch_forecasting")
    if kind == "NBeats":
        sizes = {"widths": [4, 4], "num_blocks": [1, 1], "num_block_layers": [1, 1], "backcast_loss_ratio": 0.0}
        return forecasting.NBeats.from_dataset(series(), loss=forecasting.SMAPE(), **sizes)
    sizes = {"hidden_size": 4, "hidden_continuous_size": 4, "attention_head_size": 1, "dropout": 0.1}
    loss = forecasting.QuantileLoss([0.1, 0.5, 0.9])
    return forecasting.TemporalFusionTransformer.from_dataset(series(), loss=loss, **sizes)


def windows():
    return series().to_dataloader(train=True, batch_size=8, num_workers=0)


def prediction(module, inputs):
    return module(inputs).prediction


@pytest.mark.parametrize(("kind", "num_outputs"), [("NBeats", 2), ("TemporalFusionTransformer", 2 * 3)])
def test_forecaster_needs_its_prediction_named(tmp_path, kind, num_outputs):
    monitor = check(tmp_path, lambda: forecaster(kind), windows, probe=16, behavior=prediction)
    assert monitor.records[0].num_rows == 16 * num_outputs


@pytest.mark.parametrize("name", ["NBeats"])
def test_forecaster_is_measured_without_arguments(tmp_path, name):
    monitor = BasinMonitor(16)
    _, module = fit(tmp_path, lambda: forecaster(name), windows, monitor)
    _, other = fit(tmp_path, lambda: forecaster(name), windows)
    assert fingerprint(module.state_dict()) == fingerprint(other.state_dict())
    assert all(record.gradient_rank > 0 for record in monitor.records)


def molecules():
    data = pytest.importorskip("chemprop.data")
    names = [chain * length + end for chain, end in (("C", "O"), ("C", "N"), ("CO", "C")) for length in range(1, 6)]
    names.append("c1ccccc1")
    return data.MoleculeDataset(
        [data.MoleculeDatapoint.from_smi(name, [float(index % 5)]) for index, name in enumerate(names)]
    )


def message_passing():
    models, layers = pytest.importorskip("chemprop.models"), pytest.importorskip("chemprop.nn")
    readout = layers.RegressionFFN(input_dim=6, hidden_dim=4)
    return models.MPNN(layers.BondMessagePassing(d_h=6, depth=2), layers.MeanAggregation(), readout)


def graphs():
    return pytest.importorskip("chemprop.data").build_dataloader(molecules(), batch_size=8, shuffle=False)


class OnMolecules:
    """Graphs have no first axis that counts them: the probe holds their indices, and this makes a batch of them."""

    def __init__(self) -> None:
        self.molecules = molecules()

    def __call__(self, module, indices):
        collate = pytest.importorskip("chemprop.data").collate_batch
        batch = collate([self.molecules[index] for index in indices.tolist()])
        return module(batch.bmg, batch.V_d, batch.X_d)


def test_message_passing_on_graphs_is_measured_by_indices(tmp_path):
    indices = Probe(torch.arange(16), torch.tensor([[float(index % 5)] for index in range(16)]))
    monitor = check(tmp_path, message_passing, graphs, probe=indices, behavior=OnMolecules())
    # Its criterion is found, and is the mean squared error of the targets given here.
    _, module = fit(tmp_path, message_passing, graphs)
    outputs = OnMolecules()(module.eval(), indices.inputs)
    expected = nn.functional.mse_loss(outputs, indices.targets).item()
    assert monitor.records[-1].loss == pytest.approx(expected, rel=1e-5)


def test_message_passing_on_batches_says_that_graphs_go_by_indices(tmp_path):
    behavior = lambda module, batch: module(batch.bmg, batch.V_d, batch.X_d)  # noqa: E731
    refused(tmp_path, message_passing, graphs, "indices of a data set as inputs", behavior=behavior)


def train_cells(*callbacks):
    scvi, anndata = pytest.importorskip("scvi"), pytest.importorskip("anndata")
    counts = torch.randint(1, 9, (40, 6), generator=torch.Generator().manual_seed(0)).float().numpy()
    with seeded(3):
        cells = anndata.AnnData(counts)
        scvi.model.SCVI.setup_anndata(cells)
        model = scvi.model.SCVI(cells, n_hidden=3, n_latent=2)
        trainer = {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": list(callbacks)}
        model.train(max_epochs=2, batch_size=9, shuffle_set_split=False, **trainer)
    return model


def latent_mean(plan, batch):
    return plan.module.inference(**plan.module._get_inference_input(batch))["qz"].loc


def test_training_plan_of_scvi_needs_an_output_without_sampling():
    monitor = BasinMonitor(probe=16, behavior=latent_mean, hessian=False)
    model = train_cells(monitor)
    assert fingerprint(model.module.state_dict()) == fingerprint(train_cells().module.state_dict())
    assert steps(monitor) == [0, 4, 8]
    assert monitor.records[-1].num_rows == 16 * 2
    check_doubled(
        model.module, monitor.probe, lambda module, batch: latent_mean(Plan(module), batch), monitor.records[-1]
    )


class Plan(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_training_plan_of_scvi_that_samples_is_refused():
    def rates(plan, batch):
        return plan.module(batch, compute_loss=False)[1]["px"].mean

    with pytest.raises(MisconfigurationException, match="the module draws random numbers in evaluation mode"):
        train_cells(BasinMonitor(probe=16, behavior=rates))
