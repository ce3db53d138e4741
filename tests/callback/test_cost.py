"""What is said of the cost of measuring, decided on plain numbers."""

import pytest

from lightning_basin import BasinMonitor
from lightning_basin.callback.cost import Cost, advise

EVERY_EPOCH = ("every_n_epochs", 1)


def cost(measuring, training, **stages) -> Cost:
    return Cost(measuring=measuring, training=training, stages=stages or {"ranks": measuring})


def said(made: Cost, cadence=EVERY_EPOCH, **arguments) -> str | None:
    return advise(made, cadence, BasinMonitor(**arguments))


@pytest.mark.parametrize("training", [9.0, 100.0])
def test_nothing_is_said_of_a_tenth_of_the_time(training):
    assert said(cost(1.0, training)) is None


def test_nothing_is_said_where_no_time_passes_between_measurements():
    assert said(cost(1.0, 0.0)) is None


def test_the_message_names_the_share_the_longest_stage_and_two_settings():
    # 2 of 8 s. Every fourth: 2 of 26. Without the Hessian: 0.5 of 6.5.
    assert said(cost(2.0, 6.0, hessian=1.5, ranks=0.5)) == (
        "Measuring takes 25% of the wall time. Its longest stage is 'hessian', with 1.5 of 2 s. HINT: "
        "BasinMonitor(every_n_epochs=4) brings it to 8%, BasinMonitor(hessian=False) to 8%"
    )


@pytest.mark.parametrize(
    ("made", "arguments", "expected"),
    [
        # Without the Hessian 1 of 3 s: every sixth of them is 1 of 13.
        pytest.param(cost(2.0, 2.0, hessian=1.0, ranks=1.0), {}, "hessian=False, every_n_epochs=6) to 8%", id="both"),
        pytest.param(cost(2.0, 2.0, hessian=0.9, ranks=1.1), {}, "max_overhead=0.1) to 10%", id="not the Hessian"),
        pytest.param(cost(2.0, 2.0, trace=2.0), {}, "max_overhead=0.1) to 10%", id="no Hessian"),
        pytest.param(
            cost(2.0, 9.0, duplicates=1.5, hessian=0.5),
            {"duplicates_over": "train"},
            "duplicates_over=None) to 5%",
            id="training set",
        ),
        pytest.param(cost(2.0, 9.0, duplicates=2.0), {}, "max_overhead=0.1) to 10%", id="duplicates of the probe"),
        pytest.param(
            cost(2.0, 9.0, verify_null_space=1.5, hessian=0.5),
            {"verify_null_space": 1},
            "verify_null_space='zero_loss') to 5%",
            id="verification",
        ),
    ],
)
def test_what_to_leave_out(made, arguments, expected):
    assert said(made, **arguments).endswith(f", BasinMonitor({expected}")


def test_a_verification_that_is_done_once_is_no_cost_of_a_run_that_goes_on():
    once = {"verify_null_space": "zero_loss"}
    assert said(cost(4.0, 9.0, verify_null_space=3.0, ranks=1.0), **once) is None
    # 2 of 8 s beside it.
    assert "takes 25% of the wall time. Its longest stage is 'ranks', with 2 of 2 s" in said(
        cost(5.0, 6.0, verify_null_space=3.0, ranks=2.0), **once
    )


@pytest.mark.parametrize("slower", [1.0, 1.2])
def test_who_follows_the_advice_is_not_advised_again_by_a_machine_that_is_a_little_slower(slower):
    made = cost(3.0, 1.0)
    assert said(made.every(made.times_too_often)) is None
    assert said(cost(3.0 * slower, 1.0).every(made.times_too_often)) is None


def test_a_cadence_is_multiplied():
    # 1 of 2 s, and 1 of 13 at every twelfth.
    assert "BasinMonitor(every_n_train_steps=600) brings it to 8%" in said(cost(1.0, 1.0), ("every_n_train_steps", 50))
