"""When a measurement is due, decided on plain numbers."""

from types import SimpleNamespace

import pytest

from lightning_basin.callback.schedule import Schedule


def schedule(*, begins_at=0, measured_at=0, is_resumed=False, **arguments) -> Schedule:
    defaults = {"every_n_epochs": 1, "every_n_train_steps": None, "every_n_epochs_after_zero_loss": None}
    made = Schedule(SimpleNamespace(**defaults | arguments))
    made.begin(begins_at, is_resumed=is_resumed)
    made.measured_step = measured_at
    return made


def epochs_measured(made: Schedule, *, num_epochs=6, at_zero_loss=False) -> list[int]:
    """Epochs of ten steps at whose end a measurement is due."""
    return [
        epoch
        for epoch in range(num_epochs)
        if made.is_due_after_epoch(epoch, 10 * (epoch + 1), at_zero_loss=at_zero_loss)
    ]


def steps_measured(made: Schedule, steps, *, at_zero_loss=False) -> list[int]:
    return [step for step in steps if made.is_due_after_batch(step, at_zero_loss=at_zero_loss)]


@pytest.mark.parametrize(
    ("arguments", "at_zero_loss", "expected"),
    [
        pytest.param({}, False, [0, 1, 2, 3, 4, 5], id="every epoch"),
        pytest.param({"every_n_epochs": 3}, False, [2, 5], id="every third epoch"),
        pytest.param({"every_n_train_steps": 5}, False, [], id="steps instead of epochs"),
        pytest.param({"every_n_epochs_after_zero_loss": 2}, False, [0, 1, 2, 3, 4, 5], id="before zero loss"),
        pytest.param({"every_n_epochs_after_zero_loss": 2}, True, [1, 3, 5], id="after zero loss"),
        pytest.param(
            {"every_n_train_steps": 5, "every_n_epochs_after_zero_loss": 2}, True, [1, 3, 5], id="epochs after steps"
        ),
    ],
)
def test_cadence_in_epochs(arguments, at_zero_loss, expected):
    assert epochs_measured(schedule(**arguments), at_zero_loss=at_zero_loss) == expected


def test_end_of_an_epoch_at_a_step_that_is_measured_already_is_passed_over():
    assert not schedule(measured_at=10).is_due_after_epoch(0, 10, at_zero_loss=False)


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [
        pytest.param(2, [1, 2, 3, 4, 5], [2, 4], id="one step a batch"),
        pytest.param(2, [0, 1, 1, 2, 2, 3], [2], id="several batches share a step"),
        pytest.param(4, [3, 6, 9, 12], [6, 9, 12], id="several steps in a batch"),
        pytest.param(100, [50, 99], [], id="never reached"),
    ],
)
def test_cadence_in_steps_counts_crossings(interval, steps, expected):
    assert steps_measured(schedule(every_n_train_steps=interval), steps) == expected


def test_cadence_in_steps_waits_for_the_baseline_and_catches_up_with_nothing():
    made = schedule(every_n_train_steps=2, measured_at=None)
    assert steps_measured(made, [1, 2, 3]) == []
    made.measured_step = 3
    assert steps_measured(made, [4, 5, 6]) == [4, 6]


def test_cadence_in_steps_ends_where_one_in_epochs_follows_zero_loss():
    made = schedule(every_n_train_steps=1, every_n_epochs_after_zero_loss=1)
    assert steps_measured(made, [1, 2]) == [1, 2]
    assert steps_measured(made, [3, 4], at_zero_loss=True) == []


def test_cadence_that_is_assigned_later_counts_from_then_on():
    made = schedule()
    made.arguments.every_n_epochs = 2
    assert epochs_measured(made) == [1, 3, 5]


@pytest.mark.parametrize(
    ("arguments", "position", "expected"),
    [
        pytest.param({"measured_at": 10}, (2, 20, 0), True, id="end of an epoch left out"),
        pytest.param({"measured_at": 20}, (2, 20, 0), False, id="end of an epoch measured"),
        pytest.param({"measured_at": 10}, (1, 15, 5), False, id="inside an epoch"),
        pytest.param({"measured_at": 10, "every_n_epochs": 3}, (2, 20, 0), False, id="epoch that is not due"),
        pytest.param({"measured_at": 8, "every_n_train_steps": 4}, (1, 13, 3), True, id="multiple crossed"),
        pytest.param({"measured_at": 12, "every_n_train_steps": 4}, (1, 13, 3), False, id="no multiple crossed"),
        pytest.param({"measured_at": None}, (2, 20, 0), False, id="nothing measured yet"),
    ],
)
def test_what_is_overdue_where_a_run_is_resumed(arguments, position, expected):
    made = schedule(begins_at=position[1], is_resumed=True, **arguments)
    assert made.is_overdue(*position, at_zero_loss=False) is expected
    assert not made.is_overdue(*position, at_zero_loss=False)  # Only the first batch looks back.


def test_a_run_that_is_not_resumed_has_nothing_overdue():
    assert not schedule(begins_at=20, measured_at=10).is_overdue(2, 20, 0, at_zero_loss=False)


def geometric(made: Schedule, steps, *, origin=0) -> list[int]:
    """The steps measured by a cadence in steps that becomes rarer."""
    measured = []
    for step in steps:
        if made.is_due_after_batch(step, at_zero_loss=False, sparse_since=origin):
            measured.append(step)
            made.measured_step = step
    return measured


# Each at least 5/4 times as far as the one before.
FAR_ENOUGH = [1, 2, 3, 4, 5, 7, 9, 12, 15, 19, 24, 30, 38]


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [
        pytest.param(1, range(1, 41), FAR_ENOUGH, id="every step"),
        pytest.param(10, range(1, 401), [10 * step for step in FAR_ENOUGH], id="every tenth step"),
        # The multiples 1, 2, 3, 4, 5, 7 and 9 of four are crossed at these steps.
        pytest.param(4, range(3, 40, 3), [6, 9, 12, 18, 21, 30, 36], id="several steps in a batch"),
    ],
)
def test_a_geometric_cadence_in_steps(interval, steps, expected):
    assert geometric(schedule(every_n_train_steps=interval), steps) == expected


def test_a_geometric_cadence_begins_anew_at_its_origin():
    made = schedule(every_n_train_steps=1, measured_at=100, begins_at=100)
    assert geometric(made, range(101, 141), origin=100) == [100 + step for step in FAR_ENOUGH]


def test_a_geometric_cadence_in_epochs():
    made, measured = schedule(), []
    for epoch in range(40):
        step = 10 * (epoch + 1)
        if made.is_due_after_epoch(epoch, step, at_zero_loss=False, sparse_since=0):
            measured.append(epoch + 1)
            made.measured_step = step
    assert measured == FAR_ENOUGH


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("steps_in_batch", [1, 2])
def test_a_geometric_cadence_is_the_same_wherever_a_run_is_resumed(interval, steps_in_batch):
    steps = range(steps_in_batch, 100, steps_in_batch)
    expected = geometric(schedule(every_n_train_steps=interval), steps)
    for resumed_at in steps:
        before = [step for step in expected if step <= resumed_at]
        made = schedule(
            begins_at=resumed_at, measured_at=max(before, default=0), is_resumed=True, every_n_train_steps=interval
        )
        assert not made.is_overdue(0, resumed_at, 1, at_zero_loss=False, sparse_since=0)
        assert before + geometric(made, [step for step in steps if step > resumed_at]) == expected


@pytest.mark.parametrize(
    ("arguments", "position", "expected"),
    [
        pytest.param({"measured_at": 90}, (12, 120, 0), True, id="end of an epoch left out"),
        pytest.param({"measured_at": 90}, (11, 110, 0), False, id="end of an epoch that is not far enough"),
        pytest.param({"measured_at": 9, "every_n_train_steps": 1}, (0, 12, 3), True, id="step left out"),
        pytest.param({"measured_at": 9, "every_n_train_steps": 1}, (0, 11, 3), False, id="step not far enough"),
        # 13 is far enough, but the multiple before it, 10, is not.
        pytest.param({"measured_at": 10, "every_n_train_steps": 5}, (0, 13, 3), False, id="no multiple far enough"),
    ],
)
def test_what_is_overdue_by_a_geometric_cadence(arguments, position, expected):
    made = schedule(begins_at=position[1], is_resumed=True, **arguments)
    assert made.is_overdue(*position, at_zero_loss=False, sparse_since=0) is expected


@pytest.mark.parametrize(
    ("arguments", "at_zero_loss", "expected"),
    [
        ({"every_n_epochs": 3}, False, ("every_n_epochs", 3)),
        ({"every_n_train_steps": 5}, True, ("every_n_train_steps", 5)),
        ({"every_n_epochs_after_zero_loss": 4}, False, ("every_n_epochs", 1)),
        ({"every_n_train_steps": 5, "every_n_epochs_after_zero_loss": 4}, True, ("every_n_epochs_after_zero_loss", 4)),
    ],
)
def test_the_argument_that_sets_the_cadence(arguments, at_zero_loss, expected):
    assert schedule(**arguments).cadence(at_zero_loss=at_zero_loss) == expected


def test_a_resumed_run_does_not_count_the_steps_before_it():
    made = schedule(begins_at=7, measured_at=6, is_resumed=True, every_n_train_steps=3)
    assert steps_measured(made, [8, 9, 10]) == [9]
