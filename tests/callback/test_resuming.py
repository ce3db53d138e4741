import copy
import warnings

import pytest
import torch

from lightning_basin import BasinMonitor, BasinRecord, RankEarlyStopping, measure_checkpoints
from lightning_basin.callback.resuming import read_state
from tests.lightning_packages import EarlyStopping
from tests.training import Regressor, loader, make_trainer, repeated_loader, steps, timeless

pytestmark = pytest.mark.fits


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint after two epochs, with a probe of 30 inputs taken from the first two batches."""
    root = tmp_path_factory.mktemp("run")
    trainer = make_trainer(root, BasinMonitor(30, hessian=False), RankEarlyStopping(patience=9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Regressor(), loader())
        trainer.save_checkpoint(root / "a.ckpt")
    return torch.load(root / "a.ckpt", weights_only=True)


def state_of(content, kind="BasinMonitor"):
    (key,) = (key for key in content["callbacks"] if key.startswith(kind))
    return key, content["callbacks"][key]


def resume(root, written, change, monitor=None, *callbacks):
    """Go on for two epochs from a changed state; what was said of it, and the monitor."""
    content = copy.deepcopy(written)
    key, state = state_of(content)
    content["callbacks"][key] = replaced if (replaced := change(state)) is not None else state
    torch.save(content, root / "b.ckpt")
    monitor = monitor or BasinMonitor(30, hessian=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = make_trainer(root, monitor, *callbacks, max_epochs=4)
        trainer.fit(Regressor(), loader(), ckpt_path=root / "b.ckpt")
    assert trainer.current_epoch == 4
    return [str(warning.message) for warning in said if "of another version" in str(warning.message)], monitor


def changed(*path, to=None, without=False):
    """A change of what stands at the end of a path into the state."""

    def change(state):
        for name in path[:-1]:
            state = state[name]
        if without:
            del state[path[-1]]
        else:
            state[path[-1]] = to

    return change


GOES_ON = {
    "a field of a newer version": changed("records", 0, "new_field", to=1),
    "a field of a layer": changed("records", 1, "layers", "hidden", "new_field", to=1),
    "a setting of a newer version": changed("settings", "new_setting", to=1),
    "a part of a newer version": changed("new_part", to={"a": torch.zeros(2)}),
    "no settings": changed("settings", without=True),
    "settings of another kind": changed("settings", to=[1]),
    "a setting that is a tensor": changed("settings", "rtol", to=torch.zeros(3)),
    "no measured step": changed("measured_step", without=True),
    "a measured step that is a word": changed("measured_step", to="6"),
    "a step below zero": changed("measured_step", to=-1),
    "no step of zero loss": changed("zero_loss_step", without=True),
    "a count that is a fraction": changed("num_zero_losses", to=0.5),
    "steps that are none": changed("skipped_steps", to=None),
    "a flag that is a number": changed("leave_out_loss", to=0),
    "no path": changed("history_path", without=True),
    "a path that is a number": changed("history_path", to=3),
    "no size of the probe": changed("probe_size", without=True),
    "no fingerprint": changed("probe_fingerprint", without=True),
}


SAME_PROBE = {
    "a record without a field": changed("records", 1, "gradient_rank", without=True),
    "a record without its layers": changed("records", 1, "layers", without=True),
    "a rank that is a word": changed("records", 1, "gradient_rank", to="26"),
    "a rank that is none": changed("records", 1, "gradient_rank", to=None),
    "a rank that is a tensor": changed("records", 1, "gradient_rank", to=torch.tensor(26)),
    "a rank of a layer below zero": changed("records", 0, "layers", "hidden", "gradient_rank", to=-1),
    "a layer that is none": changed("records", 0, "layers", "hidden", to=None),
    "a record that is none": changed("records", 1, to=None),
    "a record that is a list": changed("records", 1, to=[1, 2]),
    "no records": changed("records", without=True),
    "records that are a dictionary": changed("records", to={}),
}


ANEW = {
    "no dictionary": lambda _: [1, 2],
    "a word": lambda _: "state",
    "an empty dictionary": lambda _: {},
    "an empty list": lambda _: [],
    "no probe": changed("probe", without=True),
    "neither probe nor fingerprint": lambda state: state.update(probe=None, probe_fingerprint=None),
    "a probe that is a tensor": changed("probe", to=torch.zeros(30, 3)),
    "a probe that is a pair": changed("probe", to=(torch.zeros(30, 3), torch.zeros(30, 2))),
    "a probe of another structure": changed("probe", "weights", to=torch.zeros(30)),
    "a probe without inputs": changed("probe", "inputs", without=True),
    "a probe of other shapes": changed("probe", "inputs", to=torch.zeros(30, 7)),
    "a probe of other lengths": changed("probe", "inputs", to=torch.zeros(29, 3)),
    "a probe of other numbers": changed("probe", "targets", to=torch.zeros(30, 2)),
    "a fingerprint that is a number": changed("probe_fingerprint", to=7),
}


@pytest.mark.parametrize("kind", GOES_ON)
def test_a_run_goes_on_with_what_can_be_read_after_one_warning(tmp_path, written, kind):
    said, monitor = resume(tmp_path, written, GOES_ON[kind])
    assert [message.partition(":")[0] for message in said] == ["BasinMonitor goes on with the rest"]
    before = [BasinRecord.from_dict(record) for record in state_of(written)[1]["records"]]
    assert timeless(monitor.records[:3]) == timeless(before)
    assert (steps(monitor), monitor.zero_loss_step) == ([0, 3, 6, 9, 12], None)


@pytest.mark.parametrize("kind", SAME_PROBE)
def test_records_that_cannot_be_read_begin_anew_on_the_same_probe(tmp_path, written, kind):
    said, monitor = resume(tmp_path, written, SAME_PROBE[kind])
    assert [message.partition(":")[0] for message in said] == ["BasinMonitor measures anew, on the same probe"]
    assert steps(monitor) == [6, 9, 12]
    assert torch.equal(monitor.probe.inputs, state_of(written)[1]["probe"]["inputs"])


@pytest.mark.parametrize("kind", ANEW)
def test_what_no_probe_can_be_read_of_is_measured_anew(tmp_path, written, kind):
    said, monitor = resume(tmp_path, written, ANEW[kind])
    assert [message.partition(":")[0] for message in said] == ["BasinMonitor measures anew"]
    assert steps(monitor) == [6, 9, 12]
    assert monitor.probe.size == 30


def test_a_given_probe_needs_none_of_the_checkpoint(tmp_path, written):
    inputs, targets = (state_of(written)[1]["probe"][name] for name in ("inputs", "targets"))
    given = changed("probe", to=None)
    said, monitor = resume(tmp_path, written, given, BasinMonitor((inputs, targets), hessian=False))
    assert not said
    unknown = ANEW["neither probe nor fingerprint"]
    said, monitor = resume(tmp_path, written, unknown, BasinMonitor((inputs, targets), hessian=False))
    assert (len(said), steps(monitor)) == (1, [6, 9, 12])
    said, monitor = resume(
        tmp_path, written, ANEW["a probe of another structure"], BasinMonitor((inputs, targets), hessian=False)
    )
    assert not said
    assert steps(monitor) == [0, 3, 6, 9, 12]


def test_the_step_of_zero_loss_is_found_again_in_the_records(tmp_path, written):
    def change(state):
        del state["zero_loss_step"], state["num_zero_losses"]

    losses = [record["loss"] for record in state_of(written)[1]["records"]]
    monitor = BasinMonitor(30, hessian=False, zero_loss_threshold=losses[1] * 1.0001)
    assert losses[0] > monitor.zero_loss_threshold
    said, monitor = resume(tmp_path, written, change, monitor)
    assert len(said) == 1
    assert monitor.zero_loss_step == 3


def test_a_strict_early_stopping_finds_a_value_after_a_damaged_state(tmp_path, written):
    for change in (ANEW["a word"], SAME_PROBE["no records"]):
        stopping = EarlyStopping("basin/gradient_rank", patience=99)
        _, monitor = resume(tmp_path, written, change, None, stopping)
        assert stopping.best_score in [record.gradient_rank for record in monitor.records]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("wait_count"),
        lambda state: state.update(best_score=None),
        lambda state: state.update(wait_count="3"),
        lambda state: state.update(stopping_reason=77),
    ],
)
def test_rank_early_stopping_counts_anew_where_its_state_is_damaged(tmp_path, written, change):
    content = copy.deepcopy(written)
    change(state_of(content, "RankEarlyStopping")[1])
    torch.save(content, tmp_path / "b.ckpt")
    stopping = RankEarlyStopping(patience=9)
    trainer = make_trainer(tmp_path, BasinMonitor(30, hessian=False), stopping, max_epochs=3)
    with pytest.warns(UserWarning, match="counts anew: its state in the checkpoint cannot be read"):
        trainer.fit(Regressor(), loader(), ckpt_path=tmp_path / "b.ckpt")
    assert trainer.current_epoch == 3
    assert (stopping.wait_count, stopping.patience) == (0, 9)


@pytest.mark.parametrize("change", [ANEW["no dictionary"], ANEW["a probe that is a tensor"]], ids=["list", "probe"])
def test_weights_are_measured_offline_beside_a_damaged_state(tmp_path, written, change):
    content = copy.deepcopy(written)
    key, state = state_of(content)
    content["callbacks"][key] = replaced if (replaced := change(state)) is not None else state
    torch.save(content, tmp_path / "b.ckpt")
    probe = tuple(repeated_loader().dataset.tensors)
    (record,) = measure_checkpoints(tmp_path / "b.ckpt", Regressor, BasinMonitor(probe))
    assert record.step == 6


def test_a_state_as_it_was_written_is_read_without_a_problem(written):
    state = state_of(written)[1]
    read, problems = read_state(state, list(state["settings"]), None)
    assert not problems
    assert [record.to_dict() for record in read["records"]] == state["records"]


def test_counts_of_singular_values_are_read_as_they_were_written_and_refused_where_they_count_below_zero(written):
    state = copy.deepcopy(state_of(written)[1])
    state["records"][0]["gradient_spectrum"] = {-11: 4, 2: 1}
    assert read_state(state, list(state["settings"]), None)[0]["records"][0].gradient_spectrum == {-11: 4, 2: 1}
    for damaged in ({-11: -4}, {"-11": 4}, {-11: 4.5}):
        state["records"][0]["gradient_spectrum"] = damaged
        read, problems = read_state(state, list(state["settings"]), None)
        assert "records" not in read
        assert any("holds values of another type" in problem for problem in problems)
