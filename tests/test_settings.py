import numpy as np
import pytest
import torch
from torch import nn

from lightning_basin import measure_basin
from lightning_basin.settings import Settings, choose_dtype
from tests.models import sum_of_squares
from tests.networks import drawn32


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"loss_fn": sum_of_squares}, ValueError, "loss_fn needs targets to compare the outputs with, got none"),
        ({"rtol": 0.0}, ValueError, r"rtol must be a relative tolerance inside \(0, 1\), got 0.0"),
        ({"rtol": 1.0}, ValueError, r"rtol must be a relative tolerance inside \(0, 1\), got 1.0"),
        ({"rtol": -1e-6}, ValueError, r"rtol must be a relative tolerance inside \(0, 1\), got -1e-06"),
        ({"rtol": float("nan")}, ValueError, r"rtol must be a relative tolerance inside \(0, 1\), got nan"),
        ({"duplicate_rtol": 1.0}, ValueError, r"duplicate_rtol must be inside \[0, 1\), got 1.0"),
        ({"hessian": "lanczos"}, ValueError, r"hessian must be one of \('auto', .* or False, got 'lanczos'"),
        (
            {"loss_fn": "mse"},
            ValueError,
            "loss_fn must be a function of outputs and targets or 'behavioral', got 'mse'",
        ),
        (
            {"behavior": "logits"},
            ValueError,
            "behavior must be a function .*, 'outputs' or 'probabilities', got 'logits'",
        ),
        ({"layers": ["0", "1"]}, ValueError, r"layers must be among \['0', '2'\] or hold some of these, got \['1'\]"),
        ({"layers": "some"}, ValueError, "layers must be 'auto', 'all' or a list of names of layers, got 'some'"),
    ],
    ids=[
        "no targets",
        "rtol 0",
        "rtol 1",
        "rtol < 0",
        "rtol nan",
        "duplicate_rtol",
        "hessian",
        "loss",
        "behavior",
        "layer",
        "layers",
    ],
)
def test_wrong_settings_are_refused(settings, error, message):
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(error, match=message):
        measure_basin(module, drawn32(4, 2), **settings)


def test_fewer_than_one_direction_is_refused():
    with pytest.raises(ValueError, match="max_outputs must be at least 1, got 0"):
        measure_basin(nn.Linear(3, 4), drawn32(5, 3), max_outputs=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": None}, TypeError, "layers must be 'auto', 'all' or a list of names of layers, got None"),
        ({"layers": 5}, TypeError, "layers must be 'auto', 'all' or a list of names of layers, got 5"),
        ({"layers": ["", ""]}, ValueError, r"layers must be named once each, got \['', ''\]"),
        ({"rtol": "a"}, TypeError, "rtol must be a number or None, got 'a'"),
        ({"duplicate_rtol": "a"}, TypeError, "duplicate_rtol must be a number, got 'a'"),
        ({"memory_budget": "1GB"}, TypeError, "memory_budget must be a number of bytes or None, got '1GB'"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"max_outputs": 2.5}, TypeError, "max_outputs must be an integer, 'auto' or None, got 2.5"),
        ({"max_outputs": True}, TypeError, "max_outputs must be an integer, 'auto' or None, got True"),
        ({"seed": 2**64}, ValueError, r"seed must be inside \[-2\*\*63, 2\*\*64\), got 18446744073709551616"),
        ({"spectrum": "no"}, TypeError, "spectrum must be True or False, got 'no'"),
        ({"progress": "bar"}, TypeError, "progress must be True, False or None, got 'bar'"),
        ({"step": "last"}, TypeError, "step must be an integer or None, got 'last'"),
        ({"step": -1}, ValueError, "step must be at least 0, got -1"),
        ({"trained": "weight"}, TypeError, "trained must be a collection of names of parameters, got 'weight'"),
        ({"trained": None}, TypeError, "trained must be a collection of names of parameters, got None"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        measure_basin(nn.Linear(4, 2), torch.ones(5, 4), **arguments)


def test_integers_of_numpy_count_as_those_of_python():
    module, inputs = nn.Linear(4, 2), drawn32(5, 4)
    record = measure_basin(module, inputs, seed=np.int64(3), step=np.int64(7))
    assert record.to_dict() | {"seconds": {}, "measure_seconds": 0.0} == (
        measure_basin(module, inputs, seed=3, step=7).to_dict() | {"seconds": {}, "measure_seconds": 0.0}
    )
    assert type(record.step) is int


GPU, CPU, MPS = torch.device("cuda"), torch.device("cpu"), torch.device("mps")


@pytest.mark.parametrize(
    ("settings", "device", "is_slow", "expected"),
    [
        ({}, CPU, True, "float64"),
        ({}, GPU, False, "float64"),
        ({}, GPU, True, "float32"),
        ({}, MPS, True, "float32"),
        ({"dtype": "float64"}, GPU, True, "float64"),
        ({"dtype": "float32"}, CPU, False, "float32"),
        ({"hessian": False}, GPU, True, "float32"),
        ({"hessian": "dense"}, GPU, True, "float64"),
        ({"hessian": "bracket"}, MPS, True, "float64"),
        ({"hessian": "gauss-newton"}, GPU, True, "float64"),
        ({"rtol": 1e-8}, GPU, True, "float64"),
        ({"rtol": 1e-6}, GPU, True, "float32"),
        ({"taken_dtype": "float64"}, GPU, True, "float64"),
        ({"taken_dtype": "float32"}, CPU, False, "float32"),
        ({"taken_dtype": "float32", "hessian": "dense"}, GPU, True, "float64"),
    ],
    ids=str,
)
def test_the_type_follows_from_what_is_asked_then_from_the_run_then_from_the_device(
    settings, device, is_slow, expected
):
    assert choose_dtype(Settings(**settings), device, is_slow=lambda _: is_slow) == expected


def test_a_device_is_timed_only_where_its_speed_decides():
    def refuse(_):
        raise AssertionError

    for settings in ({"dtype": "float64"}, {"hessian": "dense"}, {"rtol": 1e-8}, {"taken_dtype": "float64"}):
        choose_dtype(Settings(**settings), GPU, is_slow=refuse)
    choose_dtype(Settings(), CPU, is_slow=refuse)


def test_a_decision_stays():
    settings = Settings(taken_dtype="float32")
    assert settings.on_device(CPU) == settings
    assert settings.on_device(CPU).planned_hessian is False
    assert Settings().on_device(CPU).precision == "float64"
