from typing import NamedTuple

import numpy as np
import pytest
import torch

from lightning_basin import BasinMonitor, RankEarlyStopping
from tests.callback.monitor.modules import PROBES, axis
from tests.lightning_packages import (
    EarlyStopping,
    MisconfigurationException,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    TensorBoardLogger,
)
from tests.training import (
    Regressor,
    loader,
    make_trainer,
    regression_data,
    repeated_loader,
    steps,
    timeless,
)

pytestmark = pytest.mark.fits


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
            "ever rarer": {"every_n_train_steps": 1, "max_overhead": "auto"},
        }.items()
        for kind in KINDS
    ],
)
def test_resumed_run_has_the_records_of_an_uninterrupted_one(tmp_path, kind, options):
    uninterrupted, resumed = uninterrupted_and_resumed(tmp_path, kind, **options)
    assert steps(resumed) == steps(uninterrupted)
    assert timeless(resumed.records) == timeless(uninterrupted.records)
    torch.testing.assert_close(resumed.probe.inputs, uninterrupted.probe.inputs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_with_nothing_left_to_train_ends_with_the_records_of_the_whole(tmp_path, kind):
    saving, _ = checkpoint_of_kind(tmp_path, kind)
    whole, resumed = BasinMonitor(probe=20), BasinMonitor(probe=20)
    run = {"max_epochs": 2, "val_check_interval": 1.0}
    trainer = make_trainer(tmp_path, whole, saving, **run, enable_checkpointing=True)
    trainer.fit(Regressor(), repeated_loader(), loader(20))
    make_trainer(tmp_path, resumed, **run).fit(
        Regressor(), repeated_loader(), loader(20), ckpt_path=tmp_path / "step=8.ckpt"
    )
    assert steps(resumed) == steps(whole) == [0, 4, 8]
    assert timeless(resumed.records) == timeless(whole.records)


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


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("20", "10"),
        ("20", "given"),
        ("given", "20"),
        ("given", "auto"),
        ("given", "another given"),
        ("given", "in another precision"),
    ],
)
def test_another_probe_on_resuming_is_refused_unless_it_is_asked_for(tmp_path, before, now):
    saved_run(tmp_path, BasinMonitor(PROBES[before]()), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"must be the probe of the run so far, .*, got "):
        resumed_run(tmp_path, BasinMonitor(PROBES[now]()))
    monitor = resumed_run(tmp_path, BasinMonitor(PROBES[now](), on_other_probe="replace"))
    assert steps(monitor) == [0, 4, 8, 12]
    sizes = [{"20": 20, "auto": 80}.get(name, 10) for name in (before, now, now, now)]
    assert [record.num_inputs for record in monitor.records[:1] + monitor.records[2:]] == [sizes[0], *sizes[2:]]


@pytest.mark.parametrize("same", ["20", "given"])
@pytest.mark.parametrize("on_other_probe", ["raise", "replace"])
def test_the_same_probe_goes_on(tmp_path, same, on_other_probe):
    before = saved_run(tmp_path, BasinMonitor(PROBES[same]()))
    other_batches = loader(80, 20)  # From which no other probe may be taken.
    monitor = resumed_run(tmp_path, BasinMonitor(PROBES[same](), on_other_probe=on_other_probe), other_batches)
    torch.testing.assert_close(monitor.probe.inputs, before.probe.inputs, rtol=0, atol=0)


def test_a_monitor_that_does_not_say_a_number_of_inputs_goes_on_with_that_of_the_run(tmp_path):
    before = saved_run(tmp_path, BasinMonitor(probe=20))
    monitor = resumed_run(tmp_path, BasinMonitor())
    torch.testing.assert_close(monitor.probe.inputs, before.probe.inputs, rtol=0, atol=0)
    assert {record.num_inputs for record in monitor.records} == {20}


def test_settings_that_change_the_numbers_are_said_on_resuming(tmp_path):
    saved_run(tmp_path, BasinMonitor(probe=20))
    with pytest.warns(UserWarning, match="measured with seed=0, it goes on with 4: its curves may jump here"):
        resumed_run(tmp_path, BasinMonitor(probe=20, seed=4))


def test_another_precision_is_said_on_resuming(tmp_path):
    saved_run(tmp_path, BasinMonitor(probe=20))
    with pytest.warns(UserWarning, match="measured with dtype='auto', it goes on with 'float32': its curves may"):
        monitor = resumed_run(tmp_path, BasinMonitor(probe=20, dtype="float32"))
    kept, new = monitor.records[:-1], monitor.records[-1]
    assert all(record.notes == () for record in kept)
    assert "evaluated in float32" in new.notes[-1]


def test_a_resumed_run_keeps_the_precision_that_was_taken(tmp_path):
    saved_run(tmp_path, BasinMonitor(probe=20, dtype="float32"))
    path = tmp_path / "saved.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if "BasinMonitor" in key)
    state["settings"]["dtype"] = "auto"  # As of a run on a device that is slow in float64.
    torch.save(checkpoint, path)
    monitor = resumed_run(tmp_path, BasinMonitor(probe=20))
    assert {record.dtype for record in monitor.records} == {"float32"}
    assert "dtype='auto' took float32" in monitor.records[-1].notes[-1]


def test_a_run_of_a_version_without_a_choice_goes_on_in_float64_and_nothing_is_said(tmp_path, recwarn):
    saved_run(tmp_path, BasinMonitor(probe=20, dtype="float64"))
    path = tmp_path / "saved.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if "BasinMonitor" in key)
    for record in state["records"]:
        del record["dtype"]
    torch.save(checkpoint, path)
    monitor = resumed_run(tmp_path, BasinMonitor(probe=20))
    assert [record.dtype for record in monitor.records][-1] == "float64"
    assert not [warning for warning in recwarn if "dtype" in str(warning.message)]


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
