import copy
import csv
import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from lightning_basin import BasinMonitor, Probe, RankEarlyStopping, measure_basin
from tests.lightning_packages import (
    Callback,
    CSVLogger,
    EarlyStopping,
    LightningModule,
    MisconfigurationException,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    PassThroughProfiler,
    SimpleProfiler,
    TensorBoardLogger,
)
from tests.training import (
    Eventful,
    Inline,
    Regressor,
    Scripted,
    TwoOptimizers,
    Unmeasurable,
    loader,
    make_trainer,
    regression_data,
    repeated_loader,
    scripted_loader,
    steps,
    timeless,
    witnessed,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def measured_at_start(module, inputs, targets=None, **options):
    """What the baseline must be: the initial weights, measured without a Trainer."""
    return measure_basin(module, inputs, targets, layers="auto", step=0, **options)


# ---------------------------------------------------------------------------------------------- when and what


def test_without_arguments_the_initial_weights_and_every_epoch_are_measured(tmp_path):
    module, monitor = Regressor(), BasinMonitor()
    inputs, targets = regression_data(160).tensors
    baseline = measured_at_start(copy.deepcopy(module), inputs[:128], targets[:128], loss_fn=nn.MSELoss())
    make_trainer(tmp_path, monitor, max_epochs=3).fit(module, loader(160))
    assert steps(monitor) == [0, 8, 16, 24]
    assert timeless(monitor.records[:1]) == timeless([baseline])


def test_last_record_is_of_the_final_weights(tmp_path):
    module, monitor = Regressor(), BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor).fit(module, loader())
    inputs, targets = regression_data().tensors
    final = measure_basin(module, inputs[:20], targets[:20], loss_fn=nn.MSELoss(), layers="auto", step=6)
    assert timeless(monitor.records[-1:]) == timeless([final])


def test_probe_is_the_first_inputs_in_the_order_of_the_loader(tmp_path):
    monitor = BasinMonitor(probe=30)
    make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    torch.testing.assert_close(monitor.probe.inputs, regression_data().tensors[0][:30], rtol=0, atol=0)
    torch.testing.assert_close(monitor.probe.targets, regression_data().tensors[1][:30], rtol=0, atol=0)


@pytest.mark.parametrize(("every_n_epochs", "expected"), [(1, [0, 3, 6, 9, 12, 15]), (2, [0, 6, 12]), (3, [0, 9])])
def test_every_n_epochs_measures_at_the_end_of_every_nth_epoch(tmp_path, every_n_epochs, expected):
    monitor = BasinMonitor(probe=20, every_n_epochs=every_n_epochs)
    make_trainer(tmp_path, monitor, max_epochs=5).fit(Regressor(), loader())
    assert steps(monitor) == expected


@pytest.mark.parametrize(
    ("every_n_train_steps", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 2, 4, 6]), (4, [0, 4])]
)
def test_every_n_train_steps_measures_across_epochs(tmp_path, every_n_train_steps, expected):
    monitor = BasinMonitor(probe=20, every_n_train_steps=every_n_train_steps)
    make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    assert steps(monitor) == expected


def test_every_n_train_steps_counts_optimizer_steps_under_gradient_accumulation(tmp_path):
    monitor = BasinMonitor(probe=20, every_n_train_steps=2)
    make_trainer(tmp_path, monitor, accumulate_grad_batches=3).fit(Regressor(), loader(240))
    assert steps(monitor) == [0, 2, 4, 6, 8]


def test_every_n_train_steps_keeps_to_multiples_when_the_probe_fills_in_between(tmp_path):
    monitor = BasinMonitor(probe=100, every_n_train_steps=4)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader(240))
    assert steps(monitor) == [0, 8, 12]


@pytest.mark.parametrize(("every_n_train_steps", "expected"), [(4, [0, 4, 8, 12]), (3, [0, 4, 6, 10, 12])])
def test_every_n_train_steps_counts_the_steps_of_both_optimizers(tmp_path, every_n_train_steps, expected):
    monitor = BasinMonitor(probe=20, every_n_train_steps=every_n_train_steps)
    make_trainer(tmp_path, monitor).fit(TwoOptimizers(), loader())
    assert steps(monitor) == expected


def test_manual_optimization_is_measured_at_every_epoch(tmp_path):
    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor).fit(TwoOptimizers(), loader())
    assert steps(monitor) == [0, 6, 12]


def test_probe_is_all_of_a_dataset_that_is_smaller(tmp_path):
    module, monitor = Regressor(), BasinMonitor()
    inputs, targets = regression_data(50).tensors
    baseline = measured_at_start(copy.deepcopy(module), inputs, targets, loss_fn=nn.MSELoss())
    make_trainer(tmp_path, monitor).fit(module, loader(50))
    assert steps(monitor) == [0, 3, 6]
    assert timeless(monitor.records[:1]) == timeless([baseline])


def test_probe_larger_than_a_batch_is_filled_with_every_n_train_steps_and_a_small_dataset(tmp_path):
    monitor = BasinMonitor(every_n_train_steps=4)
    make_trainer(tmp_path, monitor, max_epochs=3).fit(Regressor(), loader(50))
    assert steps(monitor) == [0, 4, 8]


def test_probe_of_256_inputs_is_collected_over_thirteen_batches(tmp_path):
    monitor = BasinMonitor(probe=256)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader(300))
    assert monitor.probe.size == 256
    assert steps(monitor) == [0, 15]


@pytest.mark.parametrize("as_pair", [True, False], ids=["pair", "Probe"])
def test_explicit_probe_is_measured_instead_of_training_batches(tmp_path, as_pair):
    module = Regressor()
    inputs, targets = regression_data(40, seed=5).tensors
    baseline = measured_at_start(copy.deepcopy(module), inputs, targets, loss_fn=nn.MSELoss())
    monitor = BasinMonitor((inputs, targets) if as_pair else Probe(inputs, targets))
    make_trainer(tmp_path, monitor).fit(module, loader())
    assert steps(monitor) == [0, 3, 6]
    assert timeless(monitor.records[:1]) == timeless([baseline])


def test_training_step_that_writes_into_its_batch_does_not_change_the_probe(tmp_path):
    class Overwriting(Regressor):
        def training_step(self, batch, batch_idx):
            loss = super().training_step([tensor.clone() for tensor in batch], batch_idx)
            batch[0].zero_()
            batch[1].fill_(7.0)
            return loss

    monitor = BasinMonitor(probe=50)
    batches = [[tensor.clone() for tensor in batch] for batch in loader()]
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Overwriting(), loader())
    torch.testing.assert_close(monitor.probe.inputs, torch.cat([inputs for inputs, _ in batches])[:50], rtol=0, atol=0)
    torch.testing.assert_close(
        monitor.probe.targets, torch.cat([targets for _, targets in batches])[:50], rtol=0, atol=0
    )


def test_only_chosen_layers_are_reported(tmp_path):
    monitor = BasinMonitor(probe=20, layers=["readout"], hessian=False)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader())
    assert list(monitor.records[0].layers) == ["readout"]
    assert monitor.records[0].hessian_nullity is None


# --------------------------------------------------------------------------------------------- batches and losses


class Autoencoder(Unmeasurable):
    def split(self, batch):
        inputs = batch if isinstance(batch, torch.Tensor) else batch[0]
        return inputs, inputs[:, :2]


class FromDicts(Regressor):
    def split(self, batch):
        return batch["features"], batch["labels"]


class DictDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, index):
        inputs, targets = regression_data()[index]
        return {"features": inputs, "labels": targets}


@pytest.mark.parametrize(
    "dataset",
    [regression_data().tensors[0], TensorDataset(regression_data().tensors[0])],
    ids=["tensor", "list of one"],
)
def test_batch_without_targets_is_measured_with_the_loss_of_the_step(tmp_path, dataset):
    monitor = BasinMonitor(probe=30)
    module, inputs = Autoencoder(), regression_data().tensors[0][:30]
    baseline = measure_basin(copy.deepcopy(module), inputs, inputs[:, :2], loss_fn=nn.MSELoss())
    make_trainer(tmp_path, monitor).fit(module, DataLoader(dataset, 20))
    assert steps(monitor) == [0, 3, 6]
    assert (monitor.records[0].gradient_rank, monitor.records[0].hessian_nullity) == (
        baseline.gradient_rank,
        baseline.hessian_nullity,
    )
    assert monitor.records[0].loss == pytest.approx(baseline.loss, rel=1e-12)


def test_batch_fn_takes_inputs_and_targets_out_of_a_dict(tmp_path):
    monitor = BasinMonitor(probe=30, batch_fn=lambda batch: (batch["features"], batch["labels"]))
    make_trainer(tmp_path, monitor).fit(FromDicts(), DataLoader(DictDataset(), 20))
    ordinary = BasinMonitor(probe=30)
    make_trainer(tmp_path, ordinary).fit(Regressor(), loader())
    assert timeless(monitor.records) == timeless(ordinary.records)


def test_behavior_takes_a_dict_as_it_is(tmp_path):
    monitor = BasinMonitor(probe=30, behavior=lambda module, batch: module(batch["features"]))
    make_trainer(tmp_path, monitor).fit(FromDicts(), DataLoader(DictDataset(), 20))
    ordinary = BasinMonitor(probe=30)
    make_trainer(tmp_path, ordinary).fit(Regressor(), loader())
    assert [r.gradient_rank for r in monitor.records] == [r.gradient_rank for r in ordinary.records]
    assert monitor.records[0].num_inputs == 30


def test_dict_batch_is_measured_by_the_training_step(tmp_path):
    monitor, ordinary = BasinMonitor(probe=30), BasinMonitor(probe=30)
    make_trainer(tmp_path, monitor).fit(FromDicts(), DataLoader(DictDataset(), 20))
    make_trainer(tmp_path, ordinary).fit(Regressor(), loader())
    assert timeless(monitor.records) == timeless(ordinary.records)


def test_dict_batch_whose_loss_is_not_called_raises_before_training(tmp_path):
    class InlineFromDicts(Inline):
        split = FromDicts.split

    module = InlineFromDicts()
    with pytest.raises(MisconfigurationException, match=r"dict with keys \['features', 'labels'\].*batch_fn="):
        make_trainer(tmp_path, BasinMonitor()).fit(module, DataLoader(DictDataset(), 20))
    assert module.num_training_steps == 0


def test_batch_fn_that_returns_no_pair_raises_before_training(tmp_path):
    module = Regressor()
    with pytest.raises(MisconfigurationException, match="batch_fn must return a pair"):
        make_trainer(tmp_path, BasinMonitor(batch_fn=lambda batch: batch[0])).fit(module, loader())
    assert module.num_training_steps == 0


class WithCriterion(Unmeasurable):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.MSELoss()


class WithLossMethod(Unmeasurable):
    def loss_fn(self, outputs, targets):
        return (outputs - targets).square().mean()


@pytest.mark.parametrize("make_module", [Regressor, WithCriterion, WithLossMethod])
def test_loss_of_the_module_is_found(tmp_path, make_module):
    monitor, module = BasinMonitor(probe=20), make_module()
    inputs, targets = (tensor[:20].double() for tensor in regression_data().tensors)
    with torch.no_grad():
        expected = (copy.deepcopy(module).double()(inputs) - targets).square().mean()
    make_trainer(tmp_path, monitor, max_epochs=1).fit(module, loader())
    torch.testing.assert_close(torch.tensor(monitor.records[0].loss, dtype=torch.float64), expected)
    assert monitor.records[0].hessian_nullity is not None


def test_given_loss_goes_before_that_of_the_module(tmp_path):
    monitor = BasinMonitor(probe=20, loss_fn=lambda outputs, targets: outputs.square().mean() + 0 * targets.sum() + 5)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader())
    assert monitor.records[0].loss > 5


def test_module_without_loss_warns_once_and_leaves_the_hessian_out(tmp_path):
    monitor = BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor)
    with pytest.warns(UserWarning, match=r"no callable 'loss_fn' or 'criterion'") as warned:
        trainer.fit(Inline(), loader())
    assert sum("Loss and Hessian" in str(warning.message) for warning in warned) == 1
    assert not [key for key in trainer.callback_metrics if "hessian" in key or key == "basin/loss"]
    assert "basin/gradient_rank" in trainer.callback_metrics


def test_found_loss_that_does_not_fit_warns_and_is_left_out(tmp_path):
    class LossOfBatches(Inline):
        def loss_fn(self, batch):
            return batch

    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match=r"not measured with the loss found on LossOfBatches.*loss_fn="):
        make_trainer(tmp_path, monitor).fit(LossOfBatches(), loader())
    assert steps(monitor) == [0, 3, 6]
    assert monitor.records[-1].loss is None


def test_found_loss_that_draws_random_numbers_warns_and_is_left_out(tmp_path):
    class Noisy(Inline):
        def loss_fn(self, outputs, targets):
            return (outputs - targets + torch.randn_like(outputs)).square().mean()

    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match="two evaluations differ"):
        make_trainer(tmp_path, monitor, max_epochs=1).fit(Noisy(), loader())
    assert monitor.records[-1].loss is None


def test_given_loss_that_draws_random_numbers_raises_before_training(tmp_path):
    module, monitor = Regressor(), BasinMonitor(probe=20, loss_fn=lambda f, y: (f - y + torch.randn_like(f)).sum())
    with pytest.raises(MisconfigurationException, match="two evaluations differ"):
        make_trainer(tmp_path, monitor).fit(module, loader())
    assert module.num_training_steps == 0


@pytest.mark.parametrize("hessian", ["auto", "bracket"])
def test_both_ends_of_the_bracket_are_curves(tmp_path, hessian):
    monitor = BasinMonitor(probe=20, hessian=hessian)
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(Regressor(), loader())
    lower, upper = (trainer.callback_metrics[f"basin/hessian_nullity_{end}"] for end in ("lower", "upper"))
    assert lower <= upper
    assert trainer.callback_metrics["basin/hessian_certified"] == (lower == upper)
    assert lower == trainer.callback_metrics["basin/gauss_newton_nullity"]
    assert monitor.records[-1].hessian_method == ("dense" if hessian == "auto" else "bracket")


def test_behavioral_loss_measures_a_hessian_and_never_reaches_zero_loss(tmp_path):
    monitor = BasinMonitor(probe=20, loss_fn="behavioral")
    make_trainer(tmp_path, monitor, max_epochs=2).fit(Unmeasurable(), loader())
    assert [record.loss for record in monitor.records] == [None] * 3
    assert monitor.zero_loss_step is None
    assert all(record.hessian_nullity == record.gradient_nullity for record in monitor.records)


def test_probabilities_are_measured_on_logits(tmp_path):
    class Classes(Unmeasurable):
        def loss_fn(self, outputs, targets):
            return nn.functional.cross_entropy(outputs, (targets[:, 0] > 0).long())

    module, monitor = Classes(), BasinMonitor(probe=20, behavior="probabilities", hessian="gauss-newton")
    make_trainer(tmp_path, monitor, max_epochs=1).fit(module, loader())
    assert all(record.gauss_newton_nullity == record.gradient_nullity for record in monitor.records)


def test_duplicates_over_the_training_set_are_counted_with_probabilities_too(tmp_path):
    monitor = BasinMonitor(probe=20, behavior="probabilities", duplicates_over="train")
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader())
    assert [record.train_num_inputs for record in monitor.records] == [60, 60]


def test_forward_may_log_and_ask_for_its_trainer(tmp_path):
    class Talkative(Regressor):
        def forward(self, inputs):
            self.log("forward_epoch", float(self.trainer.current_epoch), on_step=True)
            return super().forward(inputs)

    monitor = BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor)
    trainer.fit(Talkative(), loader())
    assert steps(monitor) == [0, 3, 6]
    assert trainer.callback_metrics["forward_epoch"] == 1.0


# ------------------------------------------------------------------------------------------------------- logging


def events_of(logger) -> EventAccumulator:
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0, "images": 0, "histograms": 0})
    return events.Reload()


def logged_run(root, monitor, module=None, **options):
    loggers = [CSVLogger(root, name="csv"), TensorBoardLogger(root, name="tensorboard")]
    trainer = make_trainer(root, monitor, logger=loggers, log_every_n_steps=1, **options)
    trainer.fit(module or Regressor(), loader(80))
    for logger in loggers:
        logger.finalize("success")
    return trainer, loggers


def test_event_file_holds_every_key_at_every_measurement_once(tmp_path):
    monitor = BasinMonitor()
    _, (_, tensorboard) = logged_run(tmp_path, monitor, max_epochs=3)
    events = events_of(tensorboard)
    expected = {
        key: [record.scalars()[key] for record in monitor.records if key in record.scalars()]
        for record in monitor.records
        for key in record.scalars()
    }
    found = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "basin" in tag}
    assert found.keys() == expected.keys()
    assert {len(values) for values in found.values()} == {4}
    # Event files hold float32.
    assert found == {key: torch.tensor(values, dtype=torch.float32).tolist() for key, values in expected.items()}


def test_no_tag_is_used_by_two_plugins_or_in_two_spellings(tmp_path):
    _, (_, tensorboard) = logged_run(tmp_path, BasinMonitor(probe=20))
    tags = events_of(tensorboard).Tags()
    counts = Counter(tag for kind in tags.values() if isinstance(kind, list) for tag in kind)
    assert max(counts.values()) == 1
    assert len({tag.lower() for tag in counts}) == len(counts)


def axis(logger, tag) -> list[int]:
    return [event.step for event in events_of(logger).Scalars(tag)]


def test_epoch_measurement_stands_at_the_last_training_loss_of_the_epoch(tmp_path):
    _, (_, tensorboard) = logged_run(tmp_path, BasinMonitor(probe=20), max_epochs=3)
    of_training = axis(tensorboard, "train_loss")
    assert axis(tensorboard, "basin/gradient_rank") == [of_training[0], *of_training[3::4]]


def test_step_measurement_stands_at_the_training_loss_of_its_batch(tmp_path):
    _, (_, tensorboard) = logged_run(tmp_path, BasinMonitor(probe=20, every_n_train_steps=3), max_epochs=3)
    of_training = axis(tensorboard, "train_loss")
    assert axis(tensorboard, "basin/gradient_rank") == [of_training[0], *of_training[2::3]]


def test_measurement_under_gradient_accumulation_stands_at_the_training_loss_of_its_step(tmp_path):
    monitor = BasinMonitor(probe=20, every_n_train_steps=1)
    _, (_, tensorboard) = logged_run(tmp_path, monitor, accumulate_grad_batches=2)
    of_training = axis(tensorboard, "train_loss")
    assert steps(monitor) == [0, 1, 2, 3, 4]
    assert axis(tensorboard, "basin/gradient_rank") == [of_training[0], *of_training]


def test_measurement_with_two_optimizers_stands_at_the_training_loss_of_its_batch(tmp_path):
    monitor = BasinMonitor(probe=20, every_n_train_steps=4)
    _, (_, tensorboard) = logged_run(tmp_path, monitor, TwoOptimizers())
    of_training = axis(tensorboard, "train_loss")
    assert axis(tensorboard, "basin/gradient_rank") == [of_training[0], *of_training[1::2]]


def test_late_baseline_stands_at_the_first_training_loss(tmp_path):
    _, (_, tensorboard) = logged_run(tmp_path, BasinMonitor(probe=60))
    assert axis(tensorboard, "basin/gradient_rank")[0] == axis(tensorboard, "train_loss")[0]


def test_csv_file_holds_one_row_for_each_measurement(tmp_path):
    monitor = BasinMonitor(probe=20)
    logged_run(tmp_path, monitor)
    lines = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("basin/gradient_rank")
    ranks = [line.split(",")[column] for line in lines[1:] if line.split(",")[column]]
    assert list(map(float, ranks)) == [record.gradient_rank for record in monitor.records]


def test_callback_metrics_hold_the_newest_record_as_scalars_of_float64_without_any_logger(tmp_path):
    monitor = BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor)
    trainer.fit(Regressor(), loader())
    expected = {key: torch.tensor(value, dtype=torch.float64) for key, value in monitor.records[-1].scalars().items()}
    found = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("basin")}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_training_loss_in_callback_metrics_is_the_last_one_of_training(tmp_path):
    with_monitor, without = make_trainer(tmp_path, BasinMonitor(probe=20)), make_trainer(tmp_path)
    with_monitor.fit(Regressor(), loader())
    without.fit(Regressor(), loader())
    assert with_monitor.callback_metrics["train_loss"] == without.callback_metrics["train_loss"]


class CountsLate(Regressor):
    """Adds to its mean at the very end of an epoch, after the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.mean.update(100.0)


def test_metrics_of_the_module_are_computed_when_lightning_computes_them(tmp_path):
    with_monitor, without = make_trainer(tmp_path, BasinMonitor(probe=20)), make_trainer(tmp_path)
    with_monitor.fit(CountsLate(), loader())
    without.fit(CountsLate(), loader())
    assert with_monitor.callback_metrics["mean"] == without.callback_metrics["mean"]


class Thawing(Regressor):
    """Thirty-three layers, frozen but for the last during the first epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(3, 3) for _ in range(33))).requires_grad_(requires_grad=False)

    def forward(self, inputs):
        return super().forward(self.body(inputs))

    def on_train_epoch_start(self):
        self.body.requires_grad_(self.current_epoch > 0)


def test_layers_that_are_freed_do_not_rename_the_curves_of_others(tmp_path):
    monitor = BasinMonitor(probe=5, hessian=False)
    make_trainer(tmp_path, monitor).fit(Thawing(), loader())
    first, last = (monitor.logged(record) for record in (monitor.records[0], monitor.records[-1]))
    assert "basin_layer_gradient_rank/body.32" in last
    assert {key for key in first if "_layer_" in key} < last.keys()
    assert not [key for key in last if "_block_" in key]


def served(port: int, path: str):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return json.load(answer)


def test_tensorboard_serves_every_key(tmp_path):
    monitor = BasinMonitor(probe=20)
    logged_run(tmp_path, monitor)
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        port = probing.getsockname()[1]
    command = ["-m", "tensorboard.main", "--logdir", str(tmp_path / "tensorboard"), "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [sys.executable, *command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        tags, deadline = {}, time.monotonic() + 60
        while "basin/gradient_rank" not in tags and time.monotonic() < deadline:
            time.sleep(0.2)
            try:
                tags = served(port, "/data/plugin/scalars/tags").get("version_0", {})
            except urllib.error.URLError:
                continue
        points = served(port, "/data/plugin/scalars/scalars?run=version_0&tag=basin%2Fgradient_rank")
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert tags.keys() >= monitor.records[0].scalars().keys()
    assert [(step, value) for _, step, value in points] == [
        (step, record.gradient_rank) for step, record in zip([0, 3, 7], monitor.records, strict=True)
    ]


# --------------------------------------------------------------------------------------------------- bit-identity


def test_training_is_bit_identical_when_the_dataset_is_smaller_than_the_probe(tmp_path):
    monitor = BasinMonitor(probe=500)
    assert witnessed(tmp_path, monitor) == witnessed(tmp_path)
    assert len(monitor.records) == 3


def test_training_is_bit_identical_with_a_behavior_that_draws_random_numbers(tmp_path):
    def behavior(module, inputs):
        torch.rand(3)
        return module(inputs)

    monitor = BasinMonitor(probe=10, behavior=behavior)
    assert witnessed(tmp_path, monitor) == witnessed(tmp_path)
    assert len(monitor.records) == 3


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
        pytest.param(3, r"the Hessian is left out", [0, 6, 12, 18], id="in the Hessian"),
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


def test_weights_that_became_nan_cost_a_warning_and_no_run(tmp_path):
    class Exploding(Regressor):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.readout.weight.data.fill_(torch.nan)

    module, monitor = Exploding(), BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match="outputs must be finite, but are NaN or infinite on 20 of the 20 inputs"):
        make_trainer(tmp_path, monitor).fit(module, loader())
    assert module.num_training_steps == 6
    assert steps(monitor) == [0, 3]


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
        MisconfigurationException, match=r"first part of the batch.*HINT: .*batch_fn=lambda batch: \(batch"
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


# ----------------------------------------------------------------------------------------------------------- time


class Ticking(PassThroughProfiler):
    """A clock that runs only while the profiler is told that something is done: three seconds a measurement."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def start(self, action_name):
        if action_name == "[BasinMonitor]basin.measure":
            self.now += 3.0
        if action_name == "run_training_batch":
            self.now += 1.0

    def __call__(self):
        return self.now


def ticking_run(root, monkeypatch, monitor, **options):
    clock = Ticking()
    monkeypatch.setattr(time, "monotonic", clock)
    make_trainer(root, monitor, profiler=clock, max_epochs=12, **options).fit(Regressor(), loader())


def test_measurements_take_at_most_their_share_of_the_time(tmp_path, monkeypatch, caplog):
    monitor, logger = BasinMonitor(probe=20, every_n_train_steps=1, max_overhead=0.25), CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        ticking_run(tmp_path, monkeypatch, monitor, logger=logger)
    # Three seconds a measurement and one a step: the k-th fits after n steps if 3 k <= (3 k + n) / 4, so if n >= 9 k.
    assert steps(monitor) == [0, 18, 27, 36]
    assert monitor.skipped_steps == [step for step in range(1, 37) if step not in (18, 27, 36)]
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open(newline="") as file:
        column = [row["basin/skipped_measurements"] for row in csv.DictReader(file)]
    assert [float(value) for value in column if value] == [0, 17, 25, 33]
    said = [message for message in caplog.messages if "max_overhead" in message]
    assert said == [
        "BasinMonitor(max_overhead=0.25) skips measurements",
        "BasinMonitor(max_overhead=0.25) skipped 33 of 37 measurements, see skipped_steps",
    ]


def test_a_run_with_time_to_spare_skips_nothing(tmp_path, monkeypatch):
    monitor = BasinMonitor(probe=20, every_n_epochs=4, max_overhead=0.5)
    ticking_run(tmp_path, monkeypatch, monitor)
    # The second measurement ends at 3 + 12 + 3 seconds, of which 6 were spent.
    assert (steps(monitor), monitor.skipped_steps) == ([0, 12, 24, 36], [])


def test_skipped_steps_survive_resuming(tmp_path):
    trainer = make_trainer(tmp_path, BasinMonitor(probe=20, max_overhead=1e-6), max_epochs=2)
    trainer.fit(Regressor(), loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor, max_epochs=3).fit(Regressor(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert (steps(monitor), monitor.skipped_steps) == ([0, 9], [3, 6])


SAID = {}


def test_a_long_measurement_is_announced_while_it_runs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_basin.callback.overhead.LONG_SECONDS", 0.01)
    begun = "Measuring basin at step 0 is taking more than 0.01 s"
    monkeypatch.setitem(SAID, "messages", caplog)

    def behavior(module, inputs):
        deadline = time.monotonic() + 60
        while len(inputs) == 15 and begun not in SAID["messages"].messages and time.monotonic() < deadline:
            time.sleep(0.001)  # The check before training has seen the first batch of 10 only.
        return module(inputs)

    with caplog.at_level("INFO"):
        make_trainer(tmp_path, BasinMonitor(probe=15, behavior=behavior), max_epochs=1).fit(Regressor(), loader(30, 10))
    (ended,) = [message for message in caplog.messages if message.startswith("Measuring basin at step 0 took ")]
    assert caplog.messages.index(begun) < caplog.messages.index(ended)
    assert threading.active_count() == len(threading.enumerate())
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_short_measurement_is_not_announced(tmp_path, caplog):
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, BasinMonitor(probe=20)).fit(Regressor(), loader())
    assert not [message for message in caplog.messages if "at step" in message]


def test_profiler_shows_what_measuring_takes(tmp_path):
    profiler = SimpleProfiler()
    make_trainer(tmp_path, BasinMonitor(probe=20, verify_null_space=2), profiler=profiler).fit(Regressor(), loader())
    durations = profiler.recorded_durations
    assert len(durations["[BasinMonitor]basin.measure"]) == 3
    assert len(durations["[BasinMonitor]basin.verify_null_space"]) == 2


@pytest.mark.parametrize("profiler", ["simple", "advanced", pytest.param("pytorch", marks=pytest.mark.slow)])
def test_every_profiler_of_lightning_lets_measurements_pass(tmp_path, profiler):
    monitor = BasinMonitor(probe=20, verify_null_space=1)
    make_trainer(tmp_path, monitor, profiler=profiler).fit(Regressor(), loader())
    assert steps(monitor) == [0, 3, 6]
    assert all(record.surviving_fraction is not None for record in monitor.records)


# ---------------------------------------------------------------------------------------- is the null space real


class WithRedundantScale(Scripted):
    """Two outputs a theta_1 x_1 and a theta_2 x_2, ...: scaling a up and theta down is free, and nothing else is."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return super().forward(inputs * self.scale)


def fractions(monitor):
    return [record.surviving_fraction for record in monitor.records]


@pytest.mark.parametrize(
    ("every_n", "measured"),
    [(None, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (5, [0]), ("zero_loss", [3])],
)
def test_null_space_is_verified_at_chosen_measurements(tmp_path, every_n, measured):
    monitor = BasinMonitor(verify_null_space=every_n)
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, monitor, logger=logger, max_epochs=4)
    trainer.fit(WithRedundantScale(losses=(1.0, 1.0, 1.0, 0.0)), scripted_loader())
    assert [record.step for record in monitor.records if record.surviving_fraction is not None] == measured
    # The manifold is the curve a theta = const: what a step of 1e-3 loses to its curvature is of order 1e-6.
    assert all(fraction is None or fraction > 1 - 1e-4 for fraction in fractions(monitor))
    if measured:
        assert len(events_of(logger).Scalars("basin/surviving_fraction")) == len(measured)


class Touching(Regressor):
    """Squared distances to (-1, 0, 0) and (1, 0, 0), on the axis: two spheres touch, and no null direction is free."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = self.readout = None
        self.point = nn.Parameter(torch.tensor([0.3, 0.0, 0.0]))

    def forward(self, inputs):
        return (inputs - self.point).square().sum(1, keepdim=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_null_space_that_is_not_free_is_seen(tmp_path):
    centres = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    monitor = BasinMonitor((centres, torch.zeros(2, 1)), verify_null_space=1)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(
        Touching(), DataLoader(TensorDataset(centres, torch.zeros(2, 1)), 2)
    )
    assert [record.gradient_nullity for record in monitor.records] == [2, 2]
    assert max(fractions(monitor)) < 0.01


def test_training_is_bit_identical_with_verification(tmp_path):
    monitor = BasinMonitor(probe=10, verify_null_space=1)
    with_monitor = witnessed(tmp_path, monitor)
    assert with_monitor == witnessed(tmp_path)
    assert None not in fractions(monitor)


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


# ----------------------------------------------------------------------------------------------------- zero loss


@pytest.mark.parametrize(
    ("patience", "threshold", "expected"), [(1, 1e-6, 2), (2, 1e-6, 6), (1, 0.2, 1), (3, 1e-6, 7), (4, 1e-6, None)]
)
def test_zero_loss_is_reached_after_patience_many_measurements_in_a_row(tmp_path, patience, threshold, expected):
    module = Scripted(losses=(1.0, 0.1, 0.0, 1.0, 1.0, 1e-7, 1e-7, 0.0, 1.0))
    monitor = BasinMonitor(zero_loss_threshold=threshold, zero_loss_patience=patience)
    make_trainer(tmp_path, monitor, max_epochs=8).fit(module, scripted_loader())
    assert monitor.zero_loss_step == expected


def test_measuring_goes_on_after_zero_loss(tmp_path):
    monitor = BasinMonitor()
    make_trainer(tmp_path, monitor, max_epochs=5).fit(Scripted(losses=(1.0, 0.0)), scripted_loader())
    assert steps(monitor) == [0, 1, 2, 3, 4, 5]
    assert monitor.zero_loss_step == 1


def test_zero_loss_is_not_found_from_the_scaled_loss_of_accumulated_batches(tmp_path):
    # What training_step returns is divided by 4 and would be below the threshold.
    monitor = BasinMonitor(zero_loss_threshold=1e-6)
    trainer = make_trainer(tmp_path, monitor, max_epochs=3, accumulate_grad_batches=4)
    trainer.fit(Scripted(losses=(1.0, 3e-6)), scripted_loader(4))
    assert steps(monitor) == [0, 1, 2, 3]
    torch.testing.assert_close(monitor.records[-1].loss, 3e-6)
    assert monitor.zero_loss_step is None


def test_zero_loss_is_found_in_evaluation_mode(tmp_path):
    module, monitor = Scripted(losses=(1.0, 0.0)), BasinMonitor()
    module.training_offset = 10.0
    trainer = make_trainer(tmp_path, monitor, max_epochs=3)
    trainer.fit(module, scripted_loader())
    assert trainer.callback_metrics["train_loss"] >= 100.0
    assert monitor.zero_loss_step == 1


def test_loss_below_zero_is_no_zero_loss(tmp_path):
    monitor = BasinMonitor(loss_fn=lambda outputs, targets: -(outputs - targets).square().mean() - 1.0)
    make_trainer(tmp_path, monitor).fit(Scripted(), scripted_loader())
    assert monitor.zero_loss_step is None


def test_zero_loss_step_is_logged_once_and_stays_in_callback_metrics(tmp_path):
    monitor = BasinMonitor()
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, monitor, logger=logger, log_every_n_steps=1, max_epochs=5)
    trainer.fit(Scripted(losses=(1.0, 1.0, 1.0, 0.0)), scripted_loader())
    (event,) = events_of(logger).Scalars("basin/zero_loss_step")
    assert (event.step, event.value) == (axis(logger, "train_loss")[2], 3.0)
    assert trainer.callback_metrics["basin/zero_loss_step"] == 3.0


def test_log10_loss_is_a_curve_that_ends_at_a_finite_floor(tmp_path):
    monitor = BasinMonitor()
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, monitor, logger=logger, max_epochs=3)
    trainer.fit(Scripted(losses=(1.0, 1e-4, 0.0)), scripted_loader())
    values = [event.value for event in events_of(logger).Scalars("basin/log10_loss")]
    # Offsets are added in float32, to integers up to 9: 1e-2 is exact to 5e-7 / 2e-2 parts of its logarithm's unit.
    torch.testing.assert_close(values, [0.0, -4.0, -40.0, -40.0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [
        ({"every_n_epochs": 1}, [0, 1, 2, 5, 10]),
        ({"every_n_epochs": 2}, [0, 2, 5, 10]),
        ({"every_n_train_steps": 1}, [0, 1, 2, 5, 10]),
    ],
)
def test_cadence_changes_after_zero_loss(tmp_path, cadence, expected):
    monitor = BasinMonitor(probe=8, every_n_epochs_after_zero_loss=5, **cadence)
    make_trainer(tmp_path, monitor, max_epochs=11).fit(Scripted(losses=(1.0, 1.0, 0.0)), scripted_loader())
    assert steps(monitor) == expected


def test_zero_loss_survives_resuming(tmp_path):
    options = {"zero_loss_patience": 2, "every_n_epochs_after_zero_loss": 4}
    checkpoint = tmp_path / "middle.ckpt"
    trainer = make_trainer(tmp_path, BasinMonitor(**options), max_epochs=3)
    trainer.fit(Scripted(losses=(1.0, 1.0, 0.0)), scripted_loader())
    trainer.save_checkpoint(checkpoint)
    monitor = BasinMonitor(**options)
    trainer = make_trainer(tmp_path, monitor, max_epochs=9)
    trainer.fit(Scripted(losses=(1.0, 1.0, 0.0)), scripted_loader(), ckpt_path=checkpoint)
    assert monitor.zero_loss_step == 3
    assert steps(monitor) == [0, 1, 2, 3, 4, 8]
    assert trainer.callback_metrics["basin/zero_loss_step"] == 3.0


@pytest.mark.parametrize("history", ["csv", "jsonl"])
def test_a_second_run_leaves_the_table_of_the_first_and_a_resumed_one_goes_on_with_its_own(tmp_path, history):
    def fit(max_epochs, **options):
        trainer = make_trainer(tmp_path, BasinMonitor(probe=20, history=history), max_epochs=max_epochs)
        trainer.fit(Regressor(), repeated_loader(), **options)
        return trainer

    def rows(name):
        return len((tmp_path / f"{name}.{history}").read_text().splitlines()) - (history == "csv")

    fit(1)
    fit(2).save_checkpoint(tmp_path / "second.ckpt")
    assert (rows("basin"), rows("basin-1")) == (2, 3)
    fit(3, ckpt_path=tmp_path / "second.ckpt")
    assert (rows("basin"), rows("basin-1")) == (2, 4)
    assert not (tmp_path / f"basin-2.{history}").exists()


def test_a_table_is_left_out_where_the_root_is_no_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = BasinMonitor(probe=20, history="csv")
    with pytest.warns(UserWarning, match=r"writes to a local disk, and is left out in memory://runs"):
        make_trainer("memory://runs", monitor).fit(Regressor(), loader())
    assert steps(monitor) == [0, 3, 6]
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- resume


def checkpoint_of_kind(root, kind):
    """Save while training on four batches an epoch, each with 20 inputs, two validations an epoch."""
    options = {
        "epoch end": {"save_on_train_epoch_end": True, "every_n_epochs": 1},
        "middle of an epoch": {"every_n_train_steps": 2, "save_on_train_epoch_end": False},
        "validation end": {"save_on_train_epoch_end": False},
        "last batch": {"every_n_train_steps": 4, "save_on_train_epoch_end": False},
    }[kind]
    wanted = {"epoch end": 8, "middle of an epoch": 6, "validation end": 8, "last batch": 8}[kind]
    saving = ModelCheckpoint(root, filename="{step}", save_top_k=-1, **options)
    return saving, root / f"step={wanted}.ckpt"


KINDS = ["epoch end", "middle of an epoch", "validation end", "last batch"]


def uninterrupted_and_resumed(root, kind, **options):
    saving, checkpoint = checkpoint_of_kind(root, kind)
    uninterrupted = BasinMonitor(probe=20, **options)
    run = {"max_epochs": 4, "val_check_interval": 1.0, "enable_checkpointing": True}
    make_trainer(root, uninterrupted, saving, **run).fit(Regressor(), repeated_loader(), loader(20))
    resumed = BasinMonitor(probe=20, **options)
    stopping = EarlyStopping("basin/gradient_rank", strict=True, patience=100)
    run["enable_checkpointing"] = False
    trainer = make_trainer(root, resumed, stopping, **run)
    trainer.fit(Regressor(), repeated_loader(), loader(20), ckpt_path=checkpoint)
    return uninterrupted, resumed


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, id=f"{kind}, {cadence}")
        for cadence, options in {
            "epochs": {},
            "3 steps": {"every_n_train_steps": 3},
            "3 epochs": {"every_n_epochs": 3},
        }.items()
        for kind in KINDS
    ],
)
def test_resumed_run_has_the_records_of_an_uninterrupted_one(tmp_path, kind, options):
    uninterrupted, resumed = uninterrupted_and_resumed(tmp_path, kind, **options)
    assert steps(resumed) == steps(uninterrupted)
    assert timeless(resumed.records) == timeless(uninterrupted.records)
    torch.testing.assert_close(resumed.probe.inputs, uninterrupted.probe.inputs, rtol=0, atol=0)


class Interrupted(Regressor):
    """Somebody presses Ctrl-C while it is measured as it was after eight steps."""

    at: int | None = 8

    def forward(self, inputs):
        if not self.training and self._trainer is not None and self.trainer.global_step == self.at:
            raise KeyboardInterrupt
        return super().forward(inputs)


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 4}])
def test_a_measurement_that_was_interrupted_is_made_when_the_run_is_resumed(tmp_path, options):
    saving = OnExceptionCheckpoint(tmp_path)
    trainer = make_trainer(tmp_path, BasinMonitor(probe=20, **options), saving, max_epochs=4, enable_checkpointing=True)
    with pytest.raises(SystemExit):
        trainer.fit(Interrupted(), repeated_loader())
    resumed, module = BasinMonitor(probe=20, **options), Interrupted()
    module.at = None
    trainer = make_trainer(tmp_path, resumed, max_epochs=4)
    trainer.fit(module, repeated_loader(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert steps(resumed) == [0, 4, 8, 12, 16]


def test_a_run_resumed_without_a_state_of_the_monitor_forgets_the_run_before(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(Regressor(), repeated_loader())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    make_trainer(tmp_path, monitor, max_epochs=3).fit(Regressor(), repeated_loader(), ckpt_path=tmp_path / "other.ckpt")
    assert steps(monitor) == [8, 12]


def test_a_trainer_that_goes_on_keeps_the_records_and_forgets_them_for_another_module(tmp_path):
    module, monitor = Regressor(), BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    found = []
    for fitted in (module, module, Regressor()):
        trainer.fit(fitted, repeated_loader())
        found.append(steps(monitor))
        trainer.fit_loop.max_epochs += 1
    assert found == [[0, 4], [0, 4, 8], [8, 12]]


def test_run_resumed_before_the_probe_was_full_still_has_a_baseline(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    run = {"max_epochs": 2, "enable_checkpointing": True}
    make_trainer(tmp_path, BasinMonitor(probe=70), saving, **run).fit(Regressor(), repeated_loader())
    monitor = BasinMonitor(probe=70)
    make_trainer(tmp_path, monitor).fit(Regressor(), repeated_loader(), ckpt_path=tmp_path / "step=2.ckpt")
    assert monitor.probe is not None
    assert steps(monitor)[-1] == 8


def test_resumed_curve_continues_on_the_same_axis(tmp_path):
    trainer = make_trainer(tmp_path, BasinMonitor(probe=20), max_epochs=1)
    trainer.fit(Regressor(), repeated_loader())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, BasinMonitor(probe=20), logger=logger, log_every_n_steps=1)
    trainer.fit(Regressor(), repeated_loader(), ckpt_path=tmp_path / "first.ckpt")
    assert axis(logger, "basin/gradient_rank") == axis(logger, "train_loss")[-1:] == [7]


@pytest.mark.parametrize("explicit", [True, False])
def test_checkpoint_loads_with_weights_only(tmp_path, explicit):
    probe = regression_data(16).tensors if explicit else 20
    trainer = make_trainer(tmp_path, BasinMonitor(probe), RankEarlyStopping())
    trainer.fit(Regressor(), loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("BasinMonitor"))
    assert [record["step"] for record in state["records"]] == [0, 3, 6]


class Image(torch.Tensor):
    """A tensor of another package."""


NUMBERS = {
    "rtol": np.float64(1e-12),
    "seed": np.int64(3),
    "max_outputs": np.int64(2),
    "duplicate_rtol": np.float32(1e-6),
}


@pytest.mark.parametrize("explicit", [True, False])
def test_numbers_of_numpy_and_tensors_of_other_packages_do_not_spoil_a_checkpoint(tmp_path, explicit):
    inputs, targets = regression_data(20).tensors
    probe = (inputs.as_subclass(Image), targets) if explicit else np.int64(20)

    def monitor():
        return BasinMonitor(probe, batch_fn=lambda batch: (batch[0].as_subclass(Image), batch[1]), **NUMBERS)

    def fit(monitor, max_epochs, **options):
        trainer = make_trainer(tmp_path, monitor, RankEarlyStopping(patience=np.int64(9)), max_epochs=max_epochs)
        trainer.fit(Regressor(), repeated_loader(), **options)
        return trainer

    fit(monitor(), 1).save_checkpoint(tmp_path / "run.ckpt")
    resumed = monitor()
    fit(resumed, 2, ckpt_path=tmp_path / "run.ckpt")
    assert steps(resumed) == [0, 4, 8]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluating_an_old_checkpoint_does_not_take_the_history_back(tmp_path, stage):
    monitor = BasinMonitor(probe=20)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(tmp_path, monitor, saving, enable_checkpointing=True)
    trainer.fit(Regressor(), loader())
    getattr(trainer, stage)(Regressor(), loader(20), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert steps(monitor) == [0, 3, 6]


def saved_run(root, monitor, batches=None, **options):
    trainer = make_trainer(root, monitor, **options)
    trainer.fit(Regressor(), batches or repeated_loader())
    trainer.save_checkpoint(root / "saved.ckpt")
    return monitor


def resumed_run(root, monitor, batches=None, **options):
    trainer = make_trainer(root, monitor, **{"max_epochs": 3} | options)
    trainer.fit(Regressor(), batches or repeated_loader(), ckpt_path=root / "saved.ckpt")
    return monitor


@pytest.mark.parametrize("weights_only", [True, None])
def test_run_resumes_from_what_weights_only_reads(tmp_path, weights_only):
    saved_run(tmp_path, BasinMonitor(probe=20))
    monitor = BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor, max_epochs=3)
    trainer.fit(Regressor(), repeated_loader(), ckpt_path=tmp_path / "saved.ckpt", weights_only=weights_only)
    assert steps(monitor) == [0, 4, 8, 12]


PROBES = {
    "20": lambda: 20,
    "10": lambda: 10,
    "given": lambda: regression_data(10, seed=9).tensors,
    "another given": lambda: regression_data(10, seed=8).tensors,
    "in another precision": lambda: [tensor.double() for tensor in regression_data(10, seed=9).tensors],
}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("20", "10"),
        ("20", "given"),
        ("given", "20"),
        ("given", "another given"),
        ("given", "in another precision"),
    ],
)
def test_another_probe_on_resuming_is_refused_unless_it_is_asked_for(tmp_path, before, now):
    saved_run(tmp_path, BasinMonitor(PROBES[before]()), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"is not the one of the run so far: that was .*, this is"):
        resumed_run(tmp_path, BasinMonitor(PROBES[now]()))
    monitor = resumed_run(tmp_path, BasinMonitor(PROBES[now](), on_other_probe="replace"))
    assert steps(monitor) == [0, 4, 8, 12]
    sizes = [20 if name == "20" else 10 for name in (before, now, now, now)]
    assert [record.num_inputs for record in monitor.records[:1] + monitor.records[2:]] == [sizes[0], *sizes[2:]]


@pytest.mark.parametrize("same", ["20", "given"])
@pytest.mark.parametrize("on_other_probe", ["raise", "replace"])
def test_the_same_probe_goes_on(tmp_path, same, on_other_probe):
    before = saved_run(tmp_path, BasinMonitor(PROBES[same]()))
    other_batches = loader(80, 20)  # From which no other probe may be taken.
    monitor = resumed_run(tmp_path, BasinMonitor(PROBES[same](), on_other_probe=on_other_probe), other_batches)
    torch.testing.assert_close(monitor.probe.inputs, before.probe.inputs, rtol=0, atol=0)


def test_settings_that_change_the_numbers_are_said_on_resuming(tmp_path):
    saved_run(tmp_path, BasinMonitor(probe=20))
    with pytest.warns(UserWarning, match="measured with seed=0, it goes on with 4: its curves may jump here"):
        resumed_run(tmp_path, BasinMonitor(probe=20, seed=4))


def test_another_precision_is_said_on_resuming(tmp_path):
    saved_run(tmp_path, BasinMonitor(probe=20))
    with pytest.warns(UserWarning, match="measured with dtype='float64', it goes on with 'float32': its curves may"):
        monitor = resumed_run(tmp_path, BasinMonitor(probe=20, dtype="float32"))
    kept, new = monitor.records[:-1], monitor.records[-1]
    assert all(record.notes == () for record in kept)
    assert "evaluated in float32" in new.notes[-1]


def test_a_monitor_says_once_what_float32_leaves_out(tmp_path, caplog):
    monitor = BasinMonitor(probe=20, dtype="float32")
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, monitor).fit(Regressor(), loader(60, 20))
    assert len(monitor.records) > 1
    assert len([message for message in caplog.messages if "evaluated in float32" in message]) == 1
    assert len([message for message in caplog.messages if "the Hessian is left out" in message]) == 1
    assert monitor.records[-1].loss is not None


def test_two_monitors_are_resumed_side_by_side(tmp_path):
    def monitors():
        held_out = regression_data(10, seed=9).tensors
        return BasinMonitor(probe=20), BasinMonitor(held_out, prefix="held_out", every_n_epochs=2)

    def fit(max_epochs, ckpt_path=None):
        train, held_out = monitors()
        stopping = [RankEarlyStopping(patience=99), RankEarlyStopping("held_out/gradient_rank", patience=99)]
        trainer = make_trainer(tmp_path, held_out, *stopping, train, max_epochs=max_epochs)
        trainer.fit(Regressor(), repeated_loader(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return train, held_out

    uninterrupted = fit(4)
    fit(2)
    resumed = fit(4, tmp_path / "saved.ckpt")
    assert [steps(monitor) for monitor in resumed] == [[0, 4, 8, 12, 16], [0, 8, 16]]
    assert [timeless(monitor.records) for monitor in resumed] == [
        timeless(monitor.records) for monitor in uninterrupted
    ]


def test_same_seed_gives_the_same_records(tmp_path):
    runs = []
    for _ in range(2):
        runs.append(BasinMonitor(probe=20, seed=4))
        make_trainer(tmp_path, runs[-1]).fit(Regressor(), loader())
    assert timeless(runs[0].records) == timeless(runs[1].records)


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_other_probe": "ask"}, r"on_other_probe='ask'\)` must be 'raise' or 'replace'"),
        ({"probe": 0}, r"probe=0\).* at least 1"),
        ({"probe": torch.zeros(2, 3)}, "probe"),
        ({"every_n_epochs": 0}, r"every_n_epochs=0\).* at least 1"),
        ({"every_n_epochs": -1}, r"every_n_epochs=-1\).* at least 1"),
        ({"every_n_train_steps": 0}, r"every_n_train_steps=0\).* at least 1"),
        ({"every_n_epochs_after_zero_loss": 0}, r"every_n_epochs_after_zero_loss=0\).* at least 1"),
        ({"zero_loss_patience": 0}, r"zero_loss_patience=0\).* at least 1"),
        ({"zero_loss_threshold": -1.0}, r"zero_loss_threshold=-1.0\).* >= 0"),
        ({"zero_loss_threshold": math.nan}, r"zero_loss_threshold=nan\).* >= 0"),
        ({"rtol": 2}, r"rtol=2\).* inside \(0, 1\)"),
        ({"rtol": 0.0}, r"rtol=0.0\).* inside \(0, 1\)"),
        ({"duplicate_rtol": 1.0}, r"duplicate_rtol=1.0\).* inside \[0, 1\)"),
        ({"hessian": "x"}, r"hessian='x'\).*'auto', 'dense', 'bracket', 'gauss-newton'\) or False"),
        ({"loss_fn": "mse"}, r"loss_fn='mse'\).*callable or 'behavioral'"),
        ({"behavior": "logits"}, r"behavior='logits'\).*callable, 'outputs' or 'probabilities'"),
        ({"verify_null_space": 0}, r"verify_null_space=0\).* at least 1"),
        ({"verify_null_space": "always"}, r"verify_null_space='always'\).*'zero_loss'"),
        ({"history": "xml"}, r"history='xml'\).*'csv', 'jsonl' or None"),
        ({"prefix": 3}, r"prefix=3.*must be a string"),
        ({"loss_fn": nn.MSELoss}, r"loss_fn=.*MSELoss.*must be callable or 'behavioral', and no class"),
        ({"loss_fn": torch.ones(9, 9)}, r"loss_fn=Tensor\)` must be callable or 'behavioral'"),
        ({"behavior": torch.ones(9, 9)}, r"behavior=Tensor\)` must be callable, 'outputs' or 'probabilities'"),
        ({"batch_fn": "inputs"}, r"batch_fn='inputs'\)` must be callable"),
        ({"prefix": "a" * 250, "history": "csv"}, r"needs a prefix of 1 to \d+ letters"),
        ({"prefix": "a/b", "history": "jsonl"}, r"needs a prefix without slashes"),
        ({"prefix": "con", "history": "csv"}, r"no name of a device"),
        ({"max_overhead": 0.0}, r"max_overhead=0.0\).* inside \(0, 1\)"),
        ({"max_overhead": 1.0}, r"max_overhead=1.0\).* inside \(0, 1\)"),
        ({"max_failures": 0}, r"max_failures=0\).* at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_argument_out_of_range_raises_at_once(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        BasinMonitor(**arguments)


class Frozen(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1))

    def configure_optimizers(self):
        self.scale.requires_grad_(requires_grad=False)
        return torch.optim.SGD([self.scale], lr=0.1)

    def training_step(self, batch, batch_idx):
        self.num_training_steps += 1


class TwoOutputs(Regressor):
    def forward(self, inputs):
        return super().forward(inputs), inputs


class NotANumber(Regressor):
    def forward(self, inputs):
        return super().forward(inputs) / 0.0


class Wide(Unmeasurable):
    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 200)

    def loss_fn(self, outputs, targets):
        return outputs.square().mean()

    def training_step(self, batch, batch_idx):
        self.num_training_steps += 1
        return self.loss_fn(self(batch[0]), batch[1])


def not_a_number(outputs, targets):
    return outputs.sum() * targets.sum() * torch.nan


@pytest.mark.parametrize(
    ("make_module", "make_monitor", "message"),
    [
        pytest.param(Frozen, BasinMonitor, "at least one trainable parameter", id="no trainable parameters"),
        pytest.param(TwoOutputs, BasinMonitor, "outputs must be a tensor, got tuple.*behavior=", id="two outputs"),
        pytest.param(NotANumber, BasinMonitor, "outputs must be finite", id="outputs not finite"),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(loss_fn=not_a_number),
            "loss on the probe must be finite",
            id="loss not finite",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(Probe(regression_data().tensors[0]), loss_fn=nn.MSELoss()),
            "needs targets",
            id="explicit probe without targets",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(batch_fn=lambda batch: (batch[0], None), loss_fn=nn.MSELoss()),
            "needs targets.*batch_fn",
            id="batches without targets",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(loss_fn=lambda outputs: outputs),
            "loss_fn must take the outputs",
            id="loss of one argument",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(loss_fn=nn.MSELoss(reduction="none")),
            "loss_fn must return one floating point number",
            id="loss that is no scalar",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor((torch.zeros(4, 9), None)),
            "bring the inputs into the shape",
            id="probe of another shape",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(layers=["readout", "no_such_layer"]),
            "layers must be among.*no_such_layer",
            id="unknown layer",
        ),
        pytest.param(Regressor, lambda: BasinMonitor(layers="x"), "layers must be 'auto', 'all'", id="layers"),
        pytest.param(
            Wide,
            lambda: BasinMonitor(max_outputs=None),
            "outputs can be measured at once",
            id="too many outputs on the whole probe",
        ),
    ],
)
def test_what_cannot_be_measured_raises_before_the_first_training_step(tmp_path, make_module, make_monitor, message):
    module = make_module()
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, make_monitor()).fit(module, loader(160))
    assert module.num_training_steps == 0


@pytest.mark.parametrize("place", ["trainer", "module"])
def test_two_monitors_with_one_prefix_are_refused_with_what_helps(tmp_path, place):
    class Configured(Regressor):
        def configure_callbacks(self):
            return [BasinMonitor(20), BasinMonitor(20)] if place == "module" else []

    monitors = [BasinMonitor(20), BasinMonitor(20)] if place == "trainer" else []
    with pytest.raises(
        MisconfigurationException, match=r"prefix of its own.*got \['basin', 'basin'\]: pass BasinMonitor\(prefix="
    ):
        make_trainer(tmp_path, *monitors).fit(Configured(), loader())


def test_a_monitor_finds_its_state_under_the_same_key_in_another_process(tmp_path):
    first = make_trainer(tmp_path, BasinMonitor(20), BasinMonitor(20, prefix="other"), max_epochs=1)
    first.fit(Regressor(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"].keys()
    monitors = BasinMonitor(20), BasinMonitor(20, prefix="other")
    assert {monitor.checkpoint_key for monitor in monitors} <= keys
    make_trainer(tmp_path, *monitors).fit(Regressor(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert [steps(monitor) for monitor in monitors] == [[0, 3, 6]] * 2


def test_two_monitors_with_two_prefixes_measure_side_by_side(tmp_path):
    train = BasinMonitor(probe=20)
    other = BasinMonitor(regression_data(10, seed=9).tensors, prefix="held_out", every_n_epochs=2)
    trainer = make_trainer(tmp_path, train, other)
    trainer.fit(Regressor(), loader())
    assert (steps(train), steps(other)) == ([0, 3, 6], [0, 6])
    assert {"basin/gradient_rank", "held_out/gradient_rank"} <= trainer.callback_metrics.keys()
    assert other.records[0].num_inputs == 10


# ----------------------------------------------------------------------------------------------------- edge runs


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fast_dev_run": True}, [0, 1]),
        ({"fast_dev_run": 2}, [0, 2]),
        ({"overfit_batches": 2}, [0, 2, 4]),
        ({"limit_train_batches": 1}, [0, 1, 2]),
        ({"limit_train_batches": 0}, []),
        ({"max_steps": 0}, []),
        ({"max_steps": 2}, [0, 2]),
        ({"max_steps": 5, "max_epochs": None}, [0, 3, 5]),
        ({"num_sanity_val_steps": 2}, [0, 3, 6]),
        ({"barebones": True, "logger": None, "enable_checkpointing": None, "num_sanity_val_steps": None}, [0, 3, 6]),
    ],
    ids=str,
)
@pytest.mark.parametrize("probe", [20, 128], ids=["full at once", "never full"])
def test_run_of_unusual_length_is_measured_where_it_trains(tmp_path, options, expected, probe):
    monitor = BasinMonitor(probe)
    make_trainer(tmp_path, monitor, **options).fit(Regressor(), loader(), loader(20))
    assert steps(monitor) == expected


def test_iterable_dataset_is_measured(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(regression_data())

    monitor = BasinMonitor(probe=40)
    make_trainer(tmp_path, monitor).fit(Regressor(), DataLoader(Stream(), 20))
    ordinary = BasinMonitor(probe=40)
    make_trainer(tmp_path, ordinary).fit(Regressor(), loader())
    assert timeless(monitor.records) == timeless(ordinary.records)


def test_second_fit_with_one_monitor_starts_anew(tmp_path):
    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader(40))
    assert steps(monitor) == [0, 2]
    assert monitor.zero_loss_step is None


def test_second_fit_after_one_that_never_measured_takes_its_own_initial_weights(tmp_path):
    monitor, module = BasinMonitor(probe=20), Regressor()
    baseline = measured_at_start(
        copy.deepcopy(module), *(t[:20] for t in regression_data().tensors), loss_fn=nn.MSELoss()
    )
    make_trainer(tmp_path, monitor, max_steps=0).fit(Regressor(), loader())
    make_trainer(tmp_path, monitor, max_epochs=1).fit(module, loader())
    assert timeless(monitor.records[:1]) == timeless([baseline])


def test_second_fit_is_not_stopped_by_the_early_stopping_of_the_first(tmp_path):
    monitor = BasinMonitor()
    first = make_trainer(tmp_path, monitor, RankEarlyStopping(patience=1, after_zero_loss=False), max_epochs=6)
    first.fit(Scripted(), scripted_loader())
    second = make_trainer(tmp_path, monitor, max_epochs=6)
    second.fit(Scripted(), scripted_loader())
    assert (first.current_epoch, second.current_epoch) == (1, 6)


def test_monitor_can_be_copied_after_a_fit(tmp_path):
    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    assert copy.deepcopy(monitor).records == monitor.records


class Headless(LightningModule):
    """Has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_module_without_forward_and_without_a_loss_asks_for_a_behavior(tmp_path):
    class HeadlessInline(Headless):
        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) - batch[1]).square().mean() + self.net.weight.square().sum()

    with pytest.raises(MisconfigurationException, match=r"behavior=.* the loss takes parameters otherwise than"):
        make_trainer(tmp_path, BasinMonitor()).fit(HeadlessInline(), loader())


@pytest.mark.parametrize(
    "settings",
    [{}, {"behavior": lambda module, inputs: module.net(inputs), "loss_fn": nn.MSELoss()}],
    ids=["by its training step", "by its behavior"],
)
def test_module_without_forward_is_measured(tmp_path, settings):
    monitor = BasinMonitor(probe=20, **settings)
    make_trainer(tmp_path, monitor).fit(Headless(), loader())
    # One linear layer: 20 inputs and the constant span 4 dimensions, for each of 2 outputs.
    assert [record.gradient_rank for record in monitor.records] == [8, 8, 8]


def test_many_outputs_are_measured_along_some_directions(tmp_path):
    monitor = BasinMonitor()
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Wide(), loader(160))
    record = monitor.records[-1]
    assert (record.num_inputs, record.num_rows) == (128, 128 * 16)
    assert any("lower bounds" in note for note in record.notes)


def test_a_found_loss_that_runs_the_module_is_left_out(tmp_path):
    class Autoencoder(Inline):
        def loss_fn(self, inputs, _):
            return self(torch.zeros(len(inputs), 3)).square().mean()

    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match="loss_fn must compute the loss from outputs and targets"):
        make_trainer(tmp_path, monitor, max_epochs=1).fit(Autoencoder(), loader())
    assert {record.loss for record in monitor.records} == {None}


def test_a_logger_that_fails_ends_no_run(tmp_path):
    class FullDisk(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("basin") for key in metrics):
                raise OSError("no space left")
            super().log_metrics(metrics, step)

    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match="FullDisk could not log. OSError: no space left"):
        make_trainer(tmp_path, monitor, logger=FullDisk(tmp_path)).fit(Regressor(), loader())
    assert len(monitor.records) > 1


def test_a_probe_of_objects_that_a_checkpoint_cannot_hold_is_taken_anew(tmp_path):
    class Batch(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor
        z: int

    def collate(items):
        x, y = torch.utils.data.default_collate(items)
        return Batch(x, y, 0)

    class OfBatches(Regressor):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch.x, batch.y), batch_idx)

    def fit(**options):
        monitor = BasinMonitor(probe=10, behavior=lambda module, batch: module(batch.x), loss_fn=None, hessian=False)
        trainer = make_trainer(tmp_path, monitor, **options)
        data = torch.utils.data.DataLoader(loader().dataset, batch_size=20, collate_fn=collate)
        return monitor, trainer, data

    monitor, trainer, data = fit(max_epochs=1)
    trainer.fit(OfBatches(), data)
    with pytest.warns(UserWarning, match="a checkpoint cannot hold"):
        trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed, trainer, data = fit(max_epochs=2)
    trainer.fit(OfBatches(), data, ckpt_path=tmp_path / "end.ckpt")
    assert len(resumed.records) == len(monitor.records) + 1

    other, trainer, _ = fit(max_epochs=2)
    data = torch.utils.data.DataLoader(regression_data(seed=1), batch_size=20, collate_fn=collate)
    with pytest.warns(UserWarning, match="had to be taken anew, and is not that of the run so far"):
        trainer.fit(OfBatches(), data, ckpt_path=tmp_path / "end.ckpt")
    assert steps(other) == steps(monitor)
    assert trainer.global_step == 6


@pytest.mark.parametrize(("num_inputs", "said"), [(60, 60), (200, 128)])
def test_what_is_said_before_the_first_measurement_counts_the_inputs_that_there_are(tmp_path, caplog, num_inputs, said):
    monitor = BasinMonitor()
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader(num_inputs))
    (message,) = [message for message in caplog.messages if message.startswith("BasinMonitor measures")]
    assert message.startswith(f"BasinMonitor measures {said} inputs x ")
    assert monitor.records[0].num_inputs == said
