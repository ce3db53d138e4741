"""A run and its checkpoints must agree to the integer, at the same steps and under the same keys."""

import json

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint

from lightning_basin import BasinMonitor, measure_checkpoints
from lightning_basin.__main__ import main
from tests.checkpoints import curves, run
from tests.lightning_packages import MisconfigurationException, WeightAveraging
from tests.training import Regressor, Scripted, TwoOptimizers, regression_data, scripted_loader, timeless

pytestmark = pytest.mark.fits


@pytest.mark.parametrize(
    ("make_module", "cadence", "saving", "options"),
    [
        pytest.param(Regressor, {}, {}, {}, id="epochs"),
        pytest.param(Regressor, {"every_n_train_steps": 1}, {"every_n_train_steps": 1}, {}, id="steps"),
        pytest.param(
            Regressor,
            {"every_n_train_steps": 1},
            {"every_n_train_steps": 1},
            {"accumulate_grad_batches": 2},
            id="accumulation",
        ),
        pytest.param(TwoOptimizers, {"every_n_train_steps": 1}, {"every_n_train_steps": 2}, {}, id="two optimizers"),
        pytest.param(TwoOptimizers, {}, {}, {}, id="two optimizers, epochs"),
    ],
)
def test_checkpoints_give_the_records_and_the_curves_of_the_run(tmp_path, make_module, cadence, saving, options):
    live = run(tmp_path, make_module(), monitor=BasinMonitor(probe=20, **cadence), saving=saving, **options)
    records = measure_checkpoints(tmp_path / "saved", make_module, log_dir=tmp_path / "offline", progress=False)
    assert timeless(records) == timeless(live.records[1:])  # The initial weights were not saved.
    of_run, of_checkpoints = curves(tmp_path / "live"), curves(tmp_path / "offline")
    assert of_checkpoints.keys() == of_run.keys()
    first = min(min(points) for points in of_run.values())
    for tag, points in of_checkpoints.items():
        # Event files keep one value a step: baseline and first step share the first.
        assert {step: value for step, value in points.items() if step > first} == {
            step: value for step, value in of_run[tag].items() if step > first
        }


def test_zero_loss_is_found_at_the_step_of_the_run(tmp_path):
    losses = (1.0, 1.0, 0.0)
    live = run(tmp_path, Scripted(losses=losses), batches=scripted_loader(), monitor=BasinMonitor())
    measure_checkpoints(tmp_path / "saved", Scripted, log_dir=tmp_path / "offline", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "offline" / "basin.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row.get("basin/zero_loss_step") for row in rows] == [None, live.zero_loss_step, None]


def test_run_without_a_monitor_is_measured_on_a_probe_of_ones_own(tmp_path):
    inputs, targets = regression_data(20).tensors
    live = run(tmp_path, Regressor(), monitor=BasinMonitor((inputs, targets)))
    monitor = BasinMonitor((inputs, targets), prefix="held_out", loss_fn=nn.MSELoss())
    records = measure_checkpoints(
        [tmp_path / "saved" / f"step={step}.ckpt" for step in (6, 3)], Regressor, monitor, progress=False
    )
    assert timeless(records) == timeless(live.records[1:3])
    assert monitor.records == []


def test_checkpoints_are_measured_in_the_precision_of_the_monitor(tmp_path):
    live = run(tmp_path, Regressor(), monitor=BasinMonitor(20, dtype="float32"))
    records = measure_checkpoints(tmp_path, Regressor, BasinMonitor(dtype="float32"), progress=False)
    assert timeless(records) == timeless(live.records[1:])
    assert "evaluated in float32" in records[0].notes[-1]


def test_function_that_returns_a_module_takes_the_weights(tmp_path):
    live = run(tmp_path, Regressor())
    records = measure_checkpoints(tmp_path, lambda: Regressor().double(), progress=False)
    assert timeless(records) == timeless(live.records[1:])


def test_weights_that_were_training_are_measured_where_averaged_ones_were_saved(tmp_path):
    live = run(tmp_path, Regressor(), WeightAveraging())
    averaged, training = (
        torch.load(tmp_path / "saved" / "step=9.ckpt", weights_only=True)[key]
        for key in ("state_dict", "current_model_state")
    )
    assert not torch.equal(averaged["readout.weight"], training["readout.weight"])
    assert timeless(measure_checkpoints(tmp_path, Regressor, progress=False)) == timeless(live.records[1:])


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    run(tmp_path, Regressor())
    cut = tmp_path / "saved" / "step=6.ckpt"
    cut.write_bytes(cut.read_bytes()[:-2000])
    with pytest.warns(UserWarning, match=r"step=6.ckpt is left out: it cannot be read"):
        records = measure_checkpoints(tmp_path, Regressor, progress=False)
    assert [record.step for record in records] == [3, 9]


def test_sharded_checkpoint_is_passed_over_with_what_to_do(tmp_path):
    run(tmp_path, Regressor(), max_epochs=1)
    state = torch.load(tmp_path / "saved" / "step=3.ckpt", weights_only=True)["state_dict"]
    distributed_checkpoint.save(state, checkpoint_id=tmp_path / "saved" / "sharded.ckpt", no_dist=True)
    with pytest.warns(UserWarning, match=r"sharded.ckpt is left out.*consolidate_checkpoint .*sharded.ckpt"):
        records = measure_checkpoints(tmp_path / "saved", Regressor, progress=False)
    assert [record.step for record in records] == [3]


def test_two_checkpoints_of_one_step_are_measured_once(tmp_path):
    run(tmp_path, Regressor(), saving={"save_last": True})
    assert (tmp_path / "saved" / "last.ckpt").exists()
    assert [record.step for record in measure_checkpoints(tmp_path, Regressor, progress=False)] == [3, 6, 9]


class Unpickled:
    """Code that a checkpoint brings along."""

    ran = False

    def __reduce__(self):
        return (exec, ("import tests.test_offline as t; t.Unpickled.ran = True",))


def test_a_checkpoint_that_brings_code_along_is_not_run(tmp_path):
    torch.save({"state_dict": {}, "global_step": 3, "extra": Unpickled()}, tmp_path / "evil.ckpt")
    with (
        pytest.warns(UserWarning, match="weights_only=False if you trust"),
        pytest.raises(FileNotFoundError, match="none of 1 checkpoints can be read"),
    ):
        measure_checkpoints(tmp_path, Regressor, progress=False)
    assert not Unpickled.ran


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoints": "nowhere"}, FileNotFoundError, "there is no checkpoint nowhere"),
        ({"checkpoints": []}, FileNotFoundError, "must be files of Lightning"),
        ({"module": Regressor()}, TypeError, r"pass type\(module\), or lambda: module"),
        ({"module": lambda: nn.Linear(2, 2)}, RuntimeError, "Missing key"),
        ({"monitor": BasinMonitor(prefix="other")}, MisconfigurationException, "there is no probe"),
        ({"monitor": BasinMonitor((torch.zeros(3, 9), None))}, MisconfigurationException, "cannot measure Regressor"),
    ],
    ids=["no file", "none", "instance", "other module", "no probe", "other probe"],
)
def test_what_cannot_be_measured_raises(tmp_path, options, error, message):
    run(tmp_path, Regressor(), max_epochs=1)
    arguments = {"checkpoints": tmp_path / "saved", "module": Regressor, "monitor": None} | options
    with pytest.raises(error, match=message):
        measure_checkpoints(**arguments, progress=False)


class Settings:
    """A hyperparameter that weights_only=True does not read."""

    width = 5


class Wide(Regressor):
    """Can only be built again from its hyperparameters."""

    def __init__(self, settings):
        super().__init__()
        self.save_hyperparameters()
        self.hidden, self.readout = nn.Linear(3, settings.width), nn.Linear(settings.width, 2)


def test_module_is_built_from_hyperparameters_that_are_trusted(tmp_path):
    live = run(tmp_path, Wide(Settings()), max_epochs=1)
    with (
        pytest.warns(UserWarning, match="weights_only=False if you trust"),
        pytest.raises(FileNotFoundError, match="none of 1 checkpoints can be read"),
    ):
        measure_checkpoints(tmp_path, Wide, progress=False)
    records = measure_checkpoints(tmp_path, Wide, weights_only=False, progress=False)
    assert timeless(records) == timeless(live.records[1:])
    assert records[0].num_parameters == (3 + 1) * 5 + (5 + 1) * 2
    main([str(tmp_path), "--module", "tests.test_offline:Wide", "--log-dir", str(tmp_path / "offline"), "--trust"])
    (row,) = map(json.loads, (tmp_path / "offline" / "basin.jsonl").read_text().splitlines())
    assert row["basin/gradient_rank"] == records[0].gradient_rank


def test_duplicates_over_a_training_set_are_those_of_the_run(tmp_path):
    live = run(tmp_path, Regressor(), monitor=BasinMonitor(probe=20, duplicates_over="train"), max_epochs=1)
    offline = BasinMonitor(probe=20, duplicates_over=regression_data())
    assert timeless(measure_checkpoints(tmp_path, Regressor, offline, progress=False)) == timeless(live.records[1:])
    with pytest.raises(MisconfigurationException, match=r"needs a run. HINT: pass the data set itself"):
        measure_checkpoints(tmp_path, Regressor, BasinMonitor(duplicates_over="train"), progress=False)


def test_checkpoints_of_another_run_below_one_folder_are_named(tmp_path):
    for name in ("first", "second"):
        run(tmp_path / name, Regressor(), max_epochs=1)
    with pytest.warns(UserWarning, match=r"Of step 3, .*first.* is measured, and .*second.* left out") as warned:
        measure_checkpoints(tmp_path, Regressor, progress=False)
    assert sum("left out" in str(warning.message) for warning in warned) == 1
