"""What two real processes over gloo hold after a fit."""

import pytest
import torch
from torch import nn

from lightning_basin import measure_basin
from lightning_basin.record import BasinRecord
from tests.callback.process_runs import Sharded, run_processes
from tests.training import Eventful, timeless

pytestmark = [pytest.mark.fits, pytest.mark.slow]


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    # Starting two processes takes longer than all they do. The first of these make process groups of their own.
    of_metrics, of_whole_modules = (
        ("synchronized", "patient"),
        ("measured", "stopped", "watched", "failing", "giving_up", "limited", "ever_rarer"),
    )
    of_waiting, of_shards = ("uneven", "never_full", "gathering", "gathering_loss"), ("sharded", "resumed", "refused")
    scenarios = of_metrics + of_whole_modules + of_waiting + of_shards
    return run_processes(tmp_path_factory.mktemp("fits"), *scenarios)


def test_both_processes_hold_equal_records_and_metrics(fits):
    first, second = (process["measured"] for process in fits)
    assert [record["step"] for record in first["records"]] == [0, 4, 8]
    assert first["records"] == second["records"]
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["basin/gradient_rank"] == first["records"][-1]["gradient_rank"]


def test_both_processes_hold_the_same_probe(fits):
    first, second = (process["measured"]["probe"] for process in fits)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# The probe that takes an epoch to fill is measured with weights that rank zero alone has kept since the start.
@pytest.mark.parametrize("name", ["measured", "never_full"])
def test_baseline_is_that_of_one_process_on_the_same_probe(fits, name):
    first = fits[0][name]
    expected = measure_basin(Eventful(), *first["probe"], loss_fn=nn.MSELoss(), layers="auto", step=0)
    assert timeless([BasinRecord.from_dict(first["records"][0])]) == timeless([expected])


@pytest.mark.parametrize("rank", [0, 1])
def test_training_on_two_processes_is_bit_identical_with_and_without_monitor(fits, rank):
    assert fits[rank]["measured"]["with_monitor"] == fits[rank]["measured"]["without"]


def test_both_processes_stop_at_the_same_step(fits):
    first, second = (process["stopped"]["last_steps"] for process in fits)
    assert first == second
    # One step an epoch, ranks 6, 5, 5, 5: Lightning's callback looks at 5, 5, 5, ours also at the baseline.
    assert first == [3, 3, 3, 3]


def test_nobody_ends_a_run_on_two_processes_for_a_value_that_is_not_there(fits):
    first, second = (process["watched"] for process in fits)
    assert first == second
    measured, failed = first
    # Full in the midst of the first four batches; of eight checks, those before it count nothing.
    assert (measured[:2], measured[3:]) == (([0, 4, 8], 8), (True, 1))
    assert 0 < measured[2] < 7
    assert failed == ([], 8, 0, True, 1)


def test_measurement_that_fails_on_one_process_ends_no_run(fits):
    first, second = (process["failing"] for process in fits)
    assert first == second
    assert (first["steps"], first["last_step"]) == ([0, 4, 8, 12], 12)  # Without a Hessian at step 8.


def test_a_process_waits_for_a_record_longer_than_for_a_gradient(fits):
    assert [process["patient"] for process in fits] == [{"steps": [0], "last_step": 2}] * 2


def test_processes_give_up_together(fits):
    first, second = (process["giving_up"] for process in fits)
    assert first == second == {"steps": [], "last_step": 16, "given_up": True}


def test_processes_skip_the_same_measurements(fits):
    first, second = (process["limited"] for process in fits)
    assert first == second
    assert sorted([*first["steps"], *first["skipped"]]) == list(range(21))


def test_processes_measure_ever_more_rarely_at_the_same_steps(fits):
    assert [process["ever_rarer"] for process in fits] == [[0, 1, 2, 3, 4, 5, 7, 9, 12, 15, 19]] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_training_of_a_sharded_module_is_bit_identical_with_and_without_monitor(fits, rank):
    assert fits[rank]["sharded"]["with_monitor"] == fits[rank]["sharded"]["without"]


def test_both_processes_hold_equal_records_of_a_sharded_module(fits):
    first, second = (process["sharded"] for process in fits)
    assert [record["step"] for record in first["records"]] == [0, 4, 8]
    for name in ("records", "late", "metrics"):
        assert first[name] == second[name]


@pytest.mark.parametrize(("name", "index"), [("records", 0), ("late", 1)])
def test_records_of_a_sharded_module_are_those_of_its_whole_weights(fits, name, index):
    found = fits[0]["sharded"]
    module, expected = Sharded(), []
    for step, state in zip((0, 4, 8), [module.state_dict(), *found["states"]], strict=True):
        module.load_state_dict(state)
        expected.append(measure_basin(module, *found["probes"][index], loss_fn=nn.MSELoss(), layers="auto", step=step))
        if step:  # The first measurement is of the weights at the start, the second of the end of the first epoch.
            module.on_train_epoch_end()
    assert timeless(map(BasinRecord.from_dict, found[name])) == timeless(expected)


def test_resumed_run_of_a_sharded_module_goes_on_with_the_same_probe_at_the_same_steps(fits):
    first, second = (process["resumed"] for process in fits)
    assert first == second
    # The module's scale and shift are in no checkpoint: only what comes before is the same to the last digit.
    assert [record["step"] for record in first["resumed"]] == [0, 4, 8]
    whole, resumed = (timeless(map(BasinRecord.from_dict, first[name])) for name in ("whole", "resumed"))
    assert resumed[:2] == whole[:2]


def test_sharded_modules_that_cannot_be_put_together_are_refused_with_the_way_to_measure_them(fits):
    first, second = (process["refused"] for process in fits)
    assert first == second
    assert "['late.bias', 'late.weight'] came or went in `configure_model`" in first[0]
    assert "ModelParallelStrategy shards them in a way that cannot be undone" in first[1]
    assert "must be made with numbers in its parameters, not on the meta device" in first[2]
    assert all("lightning_basin.measure_checkpoints" in message for message in first)


@pytest.mark.parametrize(("name", "expected"), [("uneven", [0, 8, 16]), ("never_full", [0, 4, 8])])
def test_processes_whose_probes_do_not_fill_at_once_do_not_wait_for_each_other(fits, name, expected):
    first, second = (process[name] for process in fits)
    assert first["metrics"] == second["metrics"]
    for found in (first, second):
        assert (found["steps"], found["last_step"]) == (expected, expected[-1])


def test_module_that_asks_other_processes_is_refused_and_does_not_wait_for_them(fits):
    for messages in (process["gathering"] for process in fits):
        assert "`all_gather` would wait for the others: pass a behavior" in messages[0]
        assert "`allreduce` would wait for the others: pass a behavior" in messages[1]


def test_a_loss_that_asks_other_processes_is_left_out_and_does_not_wait_for_them(fits):
    first, second = (process["gathering_loss"] for process in fits)
    assert first["steps"] == second["steps"] == [0, 4, 8]
    assert first["losses"] == [None] * 3
    assert "`allgather` would wait for the others" in first["said"][0]


def test_metrics_are_synchronized_over_processes_with_uneven_rows(fits):
    first, second = (process["synchronized"] for process in fits)
    assert first == second
    # Unit rows: ranks count the distinct ones, six rows at most; row 3 is on both processes in the first case.
    assert first["uneven"] == [6, 1, 0]
    assert first["none on one"] == first["none on zero"] == [5, 0, 1]
    assert [value for name, value in first.items() if name.endswith("then more")] == [6, 6, 6]
    assert [value for name, value in first.items() if name.endswith("then anew")] == [2, 2, 2]
