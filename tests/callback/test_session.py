"""What follows from one measurement after the other, decided on plain objects."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_basin import BasinMonitor, BasinRecord, Probe, measure_basin
from lightning_basin.callback.notices import Notices
from lightning_basin.callback.request import Findings, Request
from lightning_basin.callback.session import Session

INPUTS = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])


def session(**arguments) -> Session:
    return Session(BasinMonitor(**arguments), Notices())


@pytest.fixture(scope="module")
def measured() -> BasinRecord:
    return measure_basin(nn.Linear(2, 1), INPUTS)


def keep_all(made: Session, measured: BasinRecord, losses) -> None:
    for step, loss in enumerate(losses):
        made.keep(replace(measured, step=step, loss=loss), None)


@pytest.mark.parametrize(
    ("arguments", "losses", "expected"),
    [
        pytest.param({}, [1.0, 1e-6, 0.0], 1, id="at the threshold"),
        pytest.param({}, [1.0, None], None, id="no loss"),
        pytest.param({"zero_loss_threshold": 0.5}, [1.0, -0.7, -0.2], 2, id="by magnitude"),
        pytest.param({"zero_loss_patience": 2}, [0.0, 1.0, 0.0, 0.0, 0.0], 3, id="in a row"),
        pytest.param({}, [0.0, 1.0, 0.0], 0, id="first time only"),
    ],
)
def test_step_of_zero_loss(measured, arguments, losses, expected):
    made = session(**arguments)
    keep_all(made, measured, losses)
    assert made.results.zero_loss_step == expected


@pytest.mark.parametrize(
    ("arguments", "losses", "expected"),
    [
        pytest.param({}, [1.0, 0.0], [None, None], id="every measurement that is due"),
        pytest.param({"max_overhead": 0.1}, [1.0, 0.0], [None, None], id="by the clock"),
        pytest.param({"max_overhead": "auto"}, [1.0, None, 0.5], [0, 0, 0], id="the first"),
        # Near zero is 1e-4; a loss that is zero is looked at until it was so twice.
        pytest.param(
            {"max_overhead": "auto", "zero_loss_patience": 2},
            [1.0, 2e-4, -5e-5, 1.0, 5e-5, 1e-6, 2e-6, 0.0, 0.0, 1.0, 0.0],
            [0, 0, 2, 2, 2, None, 2, None, 8, 8, 8],
            id="near zero, and at zero",
        ),
        pytest.param({"max_overhead": "auto"}, [1.0, 1.0, 0.0, 0.0], [0, 0, 2, 2], id="zero at once"),
    ],
)
def test_steps_from_which_measurements_become_rarer(measured, arguments, losses, expected):
    made, found = session(**arguments), []
    for step, loss in enumerate(losses):
        made.keep(replace(measured, step=step, loss=loss), None)
        found.append(made.sparse_since)
    assert found == expected
    made.reset()
    assert made.sparse_since is None


def test_failures_in_a_row_end_measuring():
    made = session(max_failures=2)
    made.count_failure(in_training=True)
    assert not made.has_given_up
    with pytest.warns(UserWarning, match="stops measuring after 2 failures in a row, training goes on"):
        made.count_failure(in_training=True)
    assert made.has_given_up


def test_a_measurement_between_failures_begins_the_count_anew(measured):
    made = session(max_failures=2)
    made.count_failure(in_training=False)
    keep_all(made, measured, [1.0])
    made.count_failure(in_training=False)
    assert not made.has_given_up


def test_failures_without_a_limit_never_end_it():
    made = session(max_failures=None)
    for _ in range(9):
        made.count_failure(in_training=False)
    assert not made.has_given_up


def test_names_of_merged_inputs_are_kept_of_the_newest_record_only(measured):
    made = session()
    for step in range(2):
        made.keep(replace(measured, step=step, train_merged_inputs=((0, 1),)), None)
    assert [record.train_merged_inputs for record in made.results.records] == [(), ((0, 1),)]


def test_a_copy_fills_a_list_of_its_own(measured):
    made = session()
    keep_all(made, measured, [1.0])
    duplicate = copy.copy(made)
    keep_all(duplicate, measured, [1.0])
    assert (len(made.results.records), len(duplicate.results.records)) == (1, 2)


def test_reset_forgets_in_the_list_that_others_hold(measured):
    made = session(zero_loss_threshold=2.0)
    records = made.results.records
    keep_all(made, measured, [1.0])
    made.history_path = "basin.csv"
    made.reset()
    assert (records, made.results.zero_loss_step, made.num_zero_losses, made.history_path) == ([], None, 0, None)


def request(made: Session) -> Request:
    return Request(made.arguments, Findings(), made.results.records, Notices(), None)


def test_a_module_is_measured_without_a_trainer(measured):
    made = session()
    record = made.measure(request(made), lambda: nn.Linear(2, 1), Probe(INPUTS), 7)
    assert (record.step, record.gradient_rank, made.results.records) == (7, measured.gradient_rank, [])


def test_a_measurement_that_fails_is_one_warning():
    made = session()
    with pytest.warns(UserWarning, match=r"could not measure at step 7\. "):
        assert made.measure(request(made), lambda: nn.Linear(5, 1), Probe(INPUTS), 7) is None


@pytest.mark.parametrize(
    ("verify_null_space", "losses", "expected"),
    [
        pytest.param(None, [0.0, 0.0, 0.0], [False, False, False], id="never"),
        pytest.param(2, [1.0, 1.0, 1.0], [True, False, True], id="every second from the baseline on"),
        pytest.param("zero_loss", [1.0, 0.0, 0.0], [False, True, False], id="once"),
    ],
)
def test_when_the_null_space_is_verified(measured, monkeypatch, verify_null_space, losses, expected):
    made = session(verify_null_space=verify_null_space)
    verified = []
    monkeypatch.setattr(Session, "_verify", lambda _, request, module, probe, record: verified.append(True) or record)
    asked = []
    for step, loss in enumerate(losses):
        monkeypatch.setattr(
            "lightning_basin.callback.session.measure",
            lambda *_, loss=loss, step=step, **__: replace(measured, step=step, loss=loss),
        )
        verified.clear()
        made.keep(made.measure(request(made), lambda: nn.Linear(2, 1), Probe(INPUTS), step), None)
        asked.append(bool(verified))
    assert asked == expected


def test_a_verification_is_a_stage_of_its_own_and_adds_to_the_whole_time():
    made = session(verify_null_space=1)
    record = made.measure(request(made), lambda: nn.Linear(2, 1), Probe(INPUTS), 7)
    assert record.surviving_fraction is not None
    assert [*record.seconds][-1] == "verify_null_space"
    assert sum(record.seconds.values()) == pytest.approx(record.measure_seconds, rel=1e-12)


def test_step_of_zero_loss_is_logged_once_and_stays_for_callbacks(measured):
    made, first, later = session(), replace(measured, step=3), replace(measured, step=5)
    key = "basin/zero_loss_step"
    assert key not in made.log_values(first)
    made.results.zero_loss_step = 3
    assert [made.log_values(record).get(key) for record in (first, later)] == [3.0, None]
    assert [made.callback_values(record).get(key) for record in (first, later)] == [3.0, 3.0]


def test_row_of_a_table_begins_with_the_step(measured):
    made = session()
    assert next(iter(made.table_row(replace(measured, step=3)).items())) == ("step", 3)
    assert "step" not in made.table_row(measured)


def test_steps_that_an_earlier_run_has_skipped_by_the_clock_cost_no_word_of_another_cadence(caplog):
    made = session(max_overhead="auto")
    made.results.skipped_steps.append(3)
    with caplog.at_level("INFO"):
        made.inform_of_skipped()
    assert not caplog.messages


def test_skipped_measurements_are_noted_and_counted(measured, caplog):
    made = session(max_overhead=0.25)
    keep_all(made, measured, [1.0])
    with caplog.at_level("INFO"):
        made.inform_of_skipped()
        assert not caplog.messages
        for step in (4, 5, 6):
            made.skip(step)
        made.inform_of_skipped()
    assert made.results.skipped_steps == [4, 5, 6]
    skips, counted = caplog.messages
    assert "max_overhead=0.25) skips measurements" in skips
    assert "skipped 3 of 4 measurements" in counted
