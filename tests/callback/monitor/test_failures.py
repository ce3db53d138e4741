import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_basin import BasinMonitor, measure_basin
from tests.callback.monitor.modules import measured_at_start
from tests.lightning_packages import (
    Callback,
    MisconfigurationException,
)
from tests.training import (
    Eventful,
    Regressor,
    Unmeasurable,
    loader,
    make_trainer,
    regression_data,
    steps,
    timeless,
    witnessed,
)

pytestmark = pytest.mark.fits

EVALUATIONS = Counter()
"""How often modules below were called in evaluation mode: copies of a module share nothing but this."""


class FailsInEvaluation(Eventful):
    """Works in training, and in evaluation mode as often as `works`."""

    works = 10**9

    def forward(self, inputs):
        outputs = super().forward(inputs)
        if not self.training:
            EVALUATIONS[type(self)] += 1
            if EVALUATIONS[type(self)] > self.works:
                torch.rand(1)
                raise RuntimeError("evaluation is out of order")
        return outputs


def evaluations_of_a_baseline(root) -> int:
    """How often a module is evaluated up to the end of the first measurement."""
    EVALUATIONS.clear()
    monitor = BasinMonitor(probe=10, every_n_epochs=9)
    make_trainer(root, monitor, max_epochs=1).fit(FailsInEvaluation(), loader(60, 10))
    assert steps(monitor) == [0]
    return EVALUATIONS[FailsInEvaluation]


@pytest.mark.parametrize("evaluation", [1, 2, 3, 4])
def test_measurement_that_fails_in_any_evaluation_warns_once_and_leaves_training_bit_identical(tmp_path, evaluation):
    works = evaluations_of_a_baseline(tmp_path) + evaluation - 1

    class Breaking(FailsInEvaluation):
        pass

    Breaking.works = works
    EVALUATIONS.clear()
    monitor = BasinMonitor(probe=10)
    with pytest.warns(UserWarning, match="evaluation is out of order") as warned:
        with_monitor = witnessed(tmp_path, monitor, make_module=Breaking, limit_val_batches=0, max_epochs=3)
    messages = [str(warning.message) for warning in warned if "could not measure" in str(warning.message)]
    assert [message.split(",")[0] for message in messages] == [
        f"BasinMonitor could not measure at step {step}" for step in (6, 12, 18)
    ]
    assert steps(monitor) == [0]
    assert with_monitor == witnessed(tmp_path, make_module=Breaking, limit_val_batches=0, max_epochs=3)


@pytest.mark.parametrize(
    ("failing_call", "message", "measured"),
    [
        pytest.param(1, r"could not measure at step 12, training goes on\.", [0, 6, 18], id="in the evaluation"),
        pytest.param(2, r"the Hessian is left out", [0, 6, 12, 18], id="in the Hessian"),
    ],
)
def test_measurement_is_tried_again_after_one_that_failed(tmp_path, failing_call, message, measured):
    calls = Counter()

    def loss_fn(outputs, targets):
        calls["in this measurement"] += 1
        if calls["failing"] and calls["in this measurement"] == failing_call:
            raise RuntimeError("the loss is out of order")
        return nn.functional.mse_loss(outputs, targets)

    class Arming(Eventful):
        def on_train_epoch_start(self):
            calls["in this measurement"] = 0
            calls["failing"] = self.current_epoch == 1

    monitor = BasinMonitor(probe=10, loss_fn=loss_fn)
    options = {"make_module": Arming, "max_epochs": 3, "limit_val_batches": 0}
    with pytest.warns(UserWarning, match=f"{message}.*the loss is out of order"):
        with_monitor = witnessed(tmp_path, monitor, **options)
    assert steps(monitor) == measured
    without_hessian = [record.step for record in monitor.records if record.hessian_nullity is None]
    assert without_hessian == [step for step in measured if step == 12]
    assert with_monitor == witnessed(tmp_path, **options)


def test_failed_baseline_is_followed_by_the_next_measurement(tmp_path):
    EVALUATIONS.clear()

    def behavior(module, inputs):
        EVALUATIONS[len(inputs)] += 1
        if EVALUATIONS[20] == 1:  # The check before training has seen the first batch of 10 only.
            EVALUATIONS[20] += 1
            raise RuntimeError("not yet")
        return module(inputs)

    monitor = BasinMonitor(probe=20, behavior=behavior)
    with pytest.warns(UserWarning, match=r"could not measure at step 0, training goes on\. .*not yet") as warned:
        make_trainer(tmp_path, monitor).fit(Regressor(), loader(60, 10))
    assert sum("BasinMonitor could not" in str(warning.message) for warning in warned) == 1
    assert steps(monitor) == [6, 12]


def test_baseline_is_dated_by_its_weights_when_the_first_check_ran_out_of_memory(tmp_path):
    EVALUATIONS.clear()

    def behavior(module, inputs):
        EVALUATIONS["behavior"] += 1
        if EVALUATIONS["behavior"] == 1:
            raise torch.OutOfMemoryError("another process holds the memory")
        return module(inputs)

    class Keeping(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights[trainer.global_step] = copy.deepcopy(pl_module)

    weights = {}
    monitor = BasinMonitor(probe=40, behavior=behavior)
    with pytest.warns(UserWarning, match="another process holds the memory"):
        make_trainer(tmp_path, Keeping(), monitor).fit(Regressor(), loader())
    first = monitor.records[0]
    expected = measure_basin(weights[first.step], monitor.probe, loss_fn=nn.MSELoss())
    torch.testing.assert_close(first.loss, expected.loss)


def test_trainable_layer_that_is_never_called_is_measured_as_null_space(tmp_path):
    class WithUnused(Regressor):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(1, 1)

    monitor, ordinary = BasinMonitor(probe=20), BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(WithUnused(), loader())
    make_trainer(tmp_path, ordinary, max_epochs=1).fit(Regressor(), loader())
    assert steps(monitor) == [0, 3]
    assert [r.gradient_nullity for r in monitor.records] == [r.gradient_nullity + 2 for r in ordinary.records]
    assert [r.hessian_nullity for r in monitor.records] == [r.hessian_nullity + 2 for r in ordinary.records]


class ByOperators(Unmeasurable):
    """Makes its loss by operators, so that the step itself is the loss."""

    def training_step(self, batch, batch_idx):
        self.num_training_steps += 1
        return (self(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("kind", [Regressor, Unmeasurable, ByOperators], ids=["forward", "loss of the step", "step"])
def test_weights_that_became_nan_cost_a_warning_and_no_run(tmp_path, kind):
    class Exploding(kind):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.readout.weight.data.fill_(torch.nan)

    module, monitor = Exploding(), BasinMonitor(probe=20)
    message = r"outputs must be finite, .*on 20 of the 20 inputs.*'readout.weight'.* of the module are not finite"
    with pytest.warns(UserWarning, match=message):
        make_trainer(tmp_path, monitor).fit(module, loader())
    assert module.num_training_steps == 6
    assert steps(monitor) == [0, 3]


@pytest.mark.parametrize("kind", [Regressor, Unmeasurable, ByOperators], ids=["forward", "loss of the step", "step"])
def test_a_target_that_is_nan_leaves_the_loss_out_and_is_named(tmp_path, kind):
    inputs, targets = regression_data(20).tensors
    targets[3, 1] = torch.nan
    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match=r"got nan, as the targets of the inputs \[3\] are not: leave these out"):
        make_trainer(tmp_path, monitor, max_steps=1).fit(kind(), DataLoader(TensorDataset(inputs, targets), 20))
    assert monitor.records[0].loss is None
    assert monitor.records[0].gradient_rank is not None


def test_an_input_that_is_nan_is_refused_with_its_number_once(tmp_path):
    inputs, targets = regression_data(20).tensors
    inputs[3, 1] = torch.nan
    with pytest.raises(
        MisconfigurationException, match=r"leave out the inputs \[3\], which are not finite themselves$"
    ):
        make_trainer(tmp_path, BasinMonitor(20)).fit(Unmeasurable(), DataLoader(TensorDataset(inputs, targets), 20))


class Sequences(IterableDataset):
    """Batches whose inputs differ in length: they cannot be joined to one probe."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for length in (4, 4, 5, 6):
            yield torch.randn(20, length, 3, generator=generator), torch.randn(20, 2, generator=generator)


class SequenceRegressor(Regressor):
    def forward(self, inputs):
        return super().forward(inputs.mean(1))


def test_batches_that_do_not_fit_together_do_not_end_training(tmp_path):
    module, monitor = SequenceRegressor(), BasinMonitor()
    with pytest.warns(UserWarning, match="same structure and shapes"):
        make_trainer(tmp_path, monitor).fit(module, DataLoader(Sequences(), None))
    assert module.num_training_steps == 8
    assert (steps(monitor), monitor.probe.size) == ([0, 4, 8], 40)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError])
def test_batch_fn_that_fails_later_does_not_end_training(tmp_path, error):
    calls = Counter()

    def batch_fn(batch):
        calls["batch_fn"] += 1
        if calls["batch_fn"] == 2:
            raise error("this batch is out of order")
        return batch

    module, monitor = Regressor(), BasinMonitor(batch_fn=batch_fn)
    inputs, targets = regression_data().tensors
    baseline = measured_at_start(copy.deepcopy(module), inputs[:20], targets[:20], loss_fn=nn.MSELoss())
    with pytest.warns(UserWarning, match="this batch is out of order"):
        make_trainer(tmp_path, monitor).fit(module, loader())
    assert module.num_training_steps == 6
    assert timeless(monitor.records[:1]) == timeless([baseline])


def always_failing(error):
    def behavior(module, inputs):
        if len(inputs) == 20:  # The check before training has seen the first batch of 10 only.
            raise error
        return module(inputs)

    return behavior


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("out of order"), "RuntimeError: out of order"),
        (torch.OutOfMemoryError("no more memory"), r"no more memory. HINT: pass a smaller BasinMonitor\(probe="),
        (torch.linalg.LinAlgError("did not converge"), "LinAlgError: did not converge"),
    ],
)
def test_monitor_gives_up_after_some_failures_in_a_row_and_says_so_once(tmp_path, error, message):
    monitor = BasinMonitor(probe=20, behavior=always_failing(error), max_failures=2)
    module = Regressor()
    with pytest.warns(UserWarning, match=message) as warned:
        make_trainer(tmp_path, monitor, max_epochs=5).fit(module, loader(60, 10))
    messages = [str(warning.message) for warning in warned if "BasinMonitor" in str(warning.message)]
    assert [text.partition(",")[0] for text in messages] == [
        "BasinMonitor could not measure at step 0",
        "BasinMonitor could not measure at step 6",
        "BasinMonitor stops measuring after 2 failures in a row",
    ]
    assert module.num_training_steps == 30
    assert monitor.records == []


def test_a_behavior_that_wants_the_whole_pair_is_told_of_batch_fn(tmp_path):
    monitor = BasinMonitor(probe=20, behavior=lambda module, batch: module(batch["inputs"]))
    with pytest.raises(
        MisconfigurationException, match=r"got the inputs of the batch.*HINT: .*batch_fn=lambda batch: \(batch"
    ):
        make_trainer(tmp_path, monitor).fit(Regressor(), loader())


class Reads(Regressor):
    """Takes the lengths of words for inputs."""

    def forward(self, batch):
        return super().forward(torch.tensor([[len(word), 1.0, 2.0] for word in batch["words"]]))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch), batch["targets"])


def test_words_of_several_batches_are_measured_together(tmp_path):
    _, targets = regression_data(20).tensors
    rows = [{"words": "a" * index, "targets": target} for index, target in enumerate(targets)]
    monitor = BasinMonitor(probe=15, behavior=lambda module, batch: module(batch))
    make_trainer(tmp_path, monitor).fit(Reads(), DataLoader(rows, 5))
    assert steps(monitor) == [0, 4, 8]
    assert monitor.probe.inputs["words"] == ["a" * index for index in range(15)]
    assert monitor.records[0].num_inputs == 15


@pytest.mark.filterwarnings("error:BasinMonitor", "error:Loss and Hessian")
def test_a_filter_that_makes_errors_of_warnings_ends_no_run(tmp_path, caplog):
    module, monitor = Unmeasurable(), BasinMonitor(probe=20, behavior=always_failing(RuntimeError("out of order")))
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, monitor).fit(module, loader(60, 10))
    assert module.num_training_steps == 12
    said = [
        message for message in caplog.messages if message.startswith(("BasinMonitor could not", "Loss and Hessian"))
    ]
    assert len(said) == 4


CANNOT_ALLOCATE = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError(CANNOT_ALLOCATE)])
@pytest.mark.parametrize("where", ["behavior", "loss_fn"])
def test_memory_that_runs_out_at_the_first_check_does_not_end_the_run(tmp_path, error, where):
    def fail(*_):
        raise error

    module, monitor = Regressor(), BasinMonitor(probe=20, **{where: fail})
    with pytest.warns(UserWarning, match="HINT: pass a smaller BasinMonitor") as warned:
        make_trainer(tmp_path, monitor, max_epochs=1).fit(module, loader())
    said = [str(warning.message).partition(".")[0] for warning in warned if "HINT" in str(warning.message)]
    assert said[:2] == [
        "BasinMonitor could not check Regressor",
        "BasinMonitor could not measure at step 0, training goes on",
    ]
    assert module.num_training_steps == 3


def test_monitor_that_may_fail_keeps_trying(tmp_path):
    monitor = BasinMonitor(probe=20, behavior=always_failing(RuntimeError("no")), max_failures=None)
    with pytest.warns(UserWarning, match="could not measure") as warned:
        make_trainer(tmp_path, monitor, max_epochs=5).fit(Regressor(), loader(60, 10))
    assert sum("could not measure" in str(warning.message) for warning in warned) == 6


def test_failures_with_a_measurement_in_between_are_not_in_a_row(tmp_path):
    class Exploding(Regressor):
        def on_train_epoch_start(self):
            if self.current_epoch % 2:
                self.weight = self.readout.weight.data.clone()
                self.readout.weight.data.fill_(torch.nan)
            elif self.current_epoch:
                self.readout.weight.data.copy_(self.weight)
                self.readout.bias.data.zero_()
                self.hidden.weight.data.fill_(0.5)
                self.hidden.bias.data.zero_()
                self.trainer.optimizers[0].state.clear()  # Momentum has seen the NaN.

    monitor = BasinMonitor(probe=20, max_failures=2)
    with pytest.warns(UserWarning, match="could not measure"):
        make_trainer(tmp_path, monitor, max_epochs=7).fit(Exploding(), loader())
    # Fails at the ends of epochs 2, 4 and 6, of three steps each.
    assert steps(monitor) == [0, 3, 9, 15, 21]


def test_monitor_that_gave_up_starts_anew_with_the_next_fit(tmp_path):
    failing = [True]

    def behavior(module, inputs):
        if failing[0] and len(inputs) == 20:
            raise RuntimeError("out of order")
        return module(inputs)

    monitor = BasinMonitor(probe=20, behavior=behavior, max_failures=1)
    with pytest.warns(UserWarning, match="stops measuring after 1 failures"):
        make_trainer(tmp_path, monitor).fit(Regressor(), loader(60, 10))
    failing[0] = False
    make_trainer(tmp_path, monitor).fit(Regressor(), loader(60, 10))
    assert steps(monitor) == [0, 6, 12]


def test_verification_that_fails_costs_one_warning_and_no_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_basin.null_space.MAX_DENSE_ELEMENTS", 100)
    monitor, plain = BasinMonitor(probe=20, verify_null_space=1), BasinMonitor(probe=20)
    with pytest.warns(
        UserWarning, match="null space could not be verified.*take a probe of at most 1 inputs"
    ) as warned:
        make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    assert sum("could not be verified" in str(warning.message) for warning in warned) == 1
    make_trainer(tmp_path, plain).fit(Regressor(), loader())
    assert timeless(monitor.records) == timeless(plain.records)
