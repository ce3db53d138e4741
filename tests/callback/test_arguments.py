import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_basin import BasinMonitor
from tests.lightning_packages import (
    MisconfigurationException,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_other_probe": "ask"}, r"on_other_probe='ask'\)` must be 'raise' or 'replace'"),
        ({"probe": 0}, r"probe=0\).* at least 1"),
        ({"probe": torch.zeros(2, 3)}, "must be a number of inputs, .auto., a Probe or a pair .* got Tensor"),
        ({"probe": np.zeros((2, 3))}, "got ndarray"),
        ({"probe": "all"}, "got .all."),
        ({"every_n_epochs": 0}, r"every_n_epochs=0\).* at least 1"),
        ({"every_n_epochs": -1}, r"every_n_epochs=-1\).* at least 1"),
        ({"every_n_train_steps": 0}, r"every_n_train_steps=0\).* at least 1"),
        ({"every_n_epochs_after_zero_loss": 0}, r"every_n_epochs_after_zero_loss=0\).* at least 1"),
        ({"zero_loss_patience": 0}, r"zero_loss_patience=0\).* at least 1"),
        ({"zero_loss_threshold": -1.0}, r"zero_loss_threshold=-1.0\).* >= 0"),
        ({"zero_loss_threshold": math.nan}, r"zero_loss_threshold=nan\).* >= 0"),
        ({"rtol": 2}, r"rtol must be .* inside \(0, 1\), got 2"),
        ({"rtol": 0.0}, r"rtol must be .* inside \(0, 1\), got 0.0"),
        ({"duplicate_rtol": 1.0}, r"duplicate_rtol must be inside \[0, 1\), got 1.0"),
        ({"hessian": "x"}, r"must be .*'auto', 'dense', 'bracket', 'gauss-newton'\) or False, got 'x'"),
        ({"loss_fn": "mse"}, r"loss_fn must be a function of .* or 'behavioral', got 'mse'"),
        ({"behavior": "logits"}, r"behavior must be .*, 'outputs' or 'probabilities', got 'logits'"),
        ({"verify_null_space": 0}, r"verify_null_space=0\).* at least 1"),
        ({"verify_null_space": "always"}, r"verify_null_space='always'\).*'zero_loss'"),
        ({"history": "xml"}, r"history='xml'\).*'csv', 'jsonl' or None"),
        ({"prefix": 3}, r"prefix=3.*must be a string"),
        ({"loss_fn": nn.MSELoss}, r"loss_fn must be .*, got the class MSELoss: pass an instance"),
        ({"loss_fn": torch.ones(9, 9)}, "loss_fn must be .*, got Tensor"),
        ({"behavior": torch.ones(9, 9)}, "behavior must be .*, got Tensor"),
        ({"batch_fn": "inputs"}, r"batch_fn='inputs'\)` must be callable"),
        ({"prefix": "a" * 250, "history": "csv"}, r"needs a prefix of 1 to \d+ letters"),
        ({"prefix": "a/b", "history": "jsonl"}, r"needs a prefix without slashes"),
        ({"prefix": "con", "history": "csv"}, r"no name of a device"),
        ({"max_overhead": 0.0}, r"max_overhead=0.0\).* inside \(0, 1\)"),
        ({"max_overhead": 1.0}, r"max_overhead=1.0\).* inside \(0, 1\)"),
        ({"max_overhead": "x"}, r"max_overhead='x'\).* inside \(0, 1\) or 'auto'"),
        ({"max_failures": 0}, r"max_failures=0\).* at least 1"),
        ({"max_failures": math.inf}, r"max_failures=inf\)` must be an integer, at least 1, or None"),
        ({"every_n_epochs": "5"}, r"every_n_epochs='5'\)` must be an integer"),
        ({"every_n_epochs": True}, r"every_n_epochs=True\)` must be an integer"),
        ({"every_n_train_steps": 100.5}, r"every_n_train_steps=100.5\)` must be an integer"),
        ({"every_n_spectra": None}, r"every_n_spectra=None\)` must be an integer, at least 1$"),
        ({"zero_loss_patience": 2.5}, r"zero_loss_patience=2.5\)` must be an integer"),
        ({"zero_loss_threshold": None}, r"zero_loss_threshold=None\)` must be a number, >= 0"),
        ({"verify_null_space": True}, r"verify_null_space=True\)` must be an integer, .*'zero_loss' or None"),
        ({"max_overhead": [0.1]}, r"max_overhead=\[0.1\]\)` must be inside \(0, 1\) or 'auto'"),
        ({"report": "False"}, r"report='False'\)` must be True or False"),
        ({"figures": None}, r"figures=None\)` must be True or False"),
        ({"seed": 2**64}, r"seed must be inside \[-2\*\*63, 2\*\*64\), got 18446744073709551616"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_argument_out_of_range_raises_at_once(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        BasinMonitor(**arguments)
