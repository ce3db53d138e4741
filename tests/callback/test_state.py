import copy
import warnings
from dataclasses import dataclass

import pytest
import torch

from lightning_basin import BasinMonitor, BasinRecord, Probe, RankEarlyStopping, measure_checkpoints
from lightning_basin.callback.state import fingerprint, probe_state, read_state
from tests.lightning_packages import EarlyStopping
from tests.training import Regressor, loader, make_trainer, repeated_loader, steps, timeless

pytestmark = pytest.mark.fits


@dataclass
class Graph:
    nodes: torch.Tensor


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "other",
    [
        Probe(zeros(2, 3), zeros(2)),
        Probe(zeros(3, 2)),
        Probe(zeros(2, 3).double()),
        Probe(torch.eye(3)[:2]),
        Probe((zeros(2, 3), zeros(2, 3))),
    ],
    ids=["targets", "shape", "dtype", "values", "structure"],
)
def test_fingerprint_differs_where_the_tensors_do(other):
    assert fingerprint(other) != fingerprint(Probe(zeros(2, 3)))


def test_fingerprint_does_not_depend_on_strides_or_views():
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    turned = Probe(inputs.T.contiguous().T)
    turned.inputs.requires_grad_(requires_grad=True)
    assert fingerprint(turned) == fingerprint(Probe(inputs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64, torch.complex64])
def test_fingerprint_of_any_dtype(dtype):
    ones, zero = torch.ones(2, 1, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
    assert fingerprint(Probe(ones)) != fingerprint(Probe(zero))


def test_fingerprint_of_a_conjugate_view_is_that_of_its_numbers():
    numbers = torch.tensor([1 + 2j, 3 - 1j])
    assert fingerprint(Probe(numbers.conj())) == fingerprint(Probe(torch.tensor([1 - 2j, 3 + 1j])))


@pytest.mark.parametrize(
    ("inputs", "is_plain"),
    [({"x": zeros(2, 1), "name": ["a", None, 1.5]}, True), (Graph(zeros(2, 1)), False), ((zeros(2), {1j: 0}), False)],
    ids=["builtins", "object", "key"],
)
def test_state_holds_what_weights_only_reads(tmp_path, inputs, is_plain):
    state = probe_state(Probe(inputs))
    assert (state is not None) == is_plain
    torch.save(state, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


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


OF_ANOTHER_VERSION = {
    "a setting of a newer version": changed("settings", "new_setting", to=1),
    "a part of a newer version": changed("new_part", to={"a": torch.zeros(2)}),
    "no settings": changed("settings", without=True),
    "no measured step": changed("measured_step", without=True),
    "no step of zero loss": changed("zero_loss_step", without=True),
    "no path": changed("history_path", without=True),
    "no size of the probe": changed("probe_size", without=True),
    "no fingerprint": changed("probe_fingerprint", without=True),
}


DAMAGED = {
    "settings of another kind": changed("settings", to=[1]),
    "a measured step that is a word": changed("measured_step", to="6"),
    "a count that is a fraction": changed("num_zero_losses", to=0.5),
    "steps that are none": changed("skipped_steps", to=None),
    "a flag that is a number": changed("leave_out_loss", to=0),
    "a path that is a number": changed("history_path", to=3),
}


SAME_PROBE = {
    "a field of a newer version": changed("records", 0, "new_field", to=1),
    "a record without a field": changed("records", 1, "gradient_rank", without=True),
    "a record without its layers": changed("records", 1, "layers", without=True),
    "a record that is none": changed("records", 1, to=None),
    "a rank that is a word": changed("records", 1, "gradient_rank", to="26"),
    "a rank that is none": changed("records", 1, "gradient_rank", to=None),
    "a rank that is a tensor": changed("records", 1, "gradient_rank", to=torch.tensor(26)),
    "a rank of a layer that is a word": changed("records", 0, "layers", "hidden", "gradient_rank", to="4"),
    "a layer that is none": changed("records", 0, "layers", "hidden", to=None),
    "a step that is a word": changed("records", 1, "step", to="3"),
    "records that are a dictionary": changed("records", to={}),
    "no records": changed("records", without=True),
}


ANEW = {
    "no dictionary": lambda _: [1, 2],
    "no probe": changed("probe", without=True),
    "neither probe nor fingerprint": lambda state: state.update(probe=None, probe_fingerprint=None),
    "a probe that is a tensor": changed("probe", to=torch.zeros(30, 3)),
    "a probe of another structure": changed("probe", "weights", to=torch.zeros(30)),
    "a probe of other lengths": changed("probe", "inputs", to=torch.zeros(29, 3)),
    "a probe of other numbers": changed("probe", "targets", to=torch.zeros(30, 2)),
}


@pytest.mark.parametrize("kind", OF_ANOTHER_VERSION)
def test_a_run_goes_on_from_a_state_of_another_version(tmp_path, written, kind):
    said, monitor = resume(tmp_path, written, OF_ANOTHER_VERSION[kind])
    assert not said
    before = [BasinRecord.from_dict(record) for record in state_of(written)[1]["records"]]
    assert timeless(monitor.records[:3]) == timeless(before)
    assert (steps(monitor), monitor.zero_loss_step) == ([0, 3, 6, 9, 12], None)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_run_goes_on_without_an_entry_that_is_damaged_after_one_warning(tmp_path, written, kind):
    said, monitor = resume(tmp_path, written, DAMAGED[kind])
    assert [message.partition(":")[0] for message in said] == ["BasinMonitor goes on with the rest"]
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
    assert not said
    assert monitor.zero_loss_step == 3


def test_a_strict_early_stopping_finds_a_value_after_a_damaged_state(tmp_path, written):
    for change in (ANEW["no dictionary"], SAME_PROBE["no records"]):
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
    read, problem = read_state(state, None)
    assert not problem
    assert [record.to_dict() for record in read["records"]] == state["records"]
