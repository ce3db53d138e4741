"""The command line, called as a function and as a command."""

import json
import runpy

import pytest
import torch

from lightning_basin.__main__ import main
from tests.checkpoints import curves, run
from tests.training import Regressor, regression_data


@pytest.mark.fits
def test_command_line_writes_the_keys_of_the_run_at_its_steps(tmp_path):
    run(tmp_path, Regressor())
    offline = tmp_path / "offline"
    main([str(tmp_path / "saved"), "--module", "tests.training:Regressor", "--log-dir", str(offline)])
    live = {
        tag: {x: value for x, value in points.items() if x > 0} for tag, points in curves(tmp_path / "live").items()
    }
    assert curves(offline) == live
    assert {path.name for path in offline.iterdir()} >= {"basin.jsonl", "metrics.csv"}


def test_package_runs_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lightning_basin", "--help"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_module("lightning_basin", run_name="__main__")
    assert exited.value.code == 0
    assert "python -m lightning_basin" in capsys.readouterr().out


@pytest.mark.fits
def test_command_line_takes_a_probe_a_loss_and_settings(tmp_path):
    run(tmp_path, Regressor(), max_epochs=1)
    torch.save(regression_data(7).tensors, tmp_path / "probe.pt")
    command = [str(tmp_path / "saved"), "--module", "tests.training:Regressor", "--log-dir", str(tmp_path / "offline")]
    command += ["--probe", str(tmp_path / "probe.pt"), "--loss-fn", "torch.nn.functional:l1_loss"]
    main([*command, "--set", "hessian=False", "prefix=held_out", "--set", 'layers=["readout"]'])
    (row,) = map(json.loads, (tmp_path / "offline" / "held_out.jsonl").read_text().splitlines())
    assert row["held_out_layer_gradient_rank/readout"] <= 7 * 2
    assert not [key for key in row if "hessian" in key or key.endswith("/hidden")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--module", "tests.training:Nothing"], "must be PACKAGE.MODULE:NAME"),
        (["--module", "no_such_package:Nothing"], "must be PACKAGE.MODULE:NAME"),
        (["--module", "tests.training:Regressor", "--set", "hessian"], "must be ARGUMENT=VALUE"),
        (
            ["--module", "tests.training:Regressor", "--set", "hesian=False"],
            "['hesian'] must be arguments of BasinMonitor",
        ),
        (
            ["--module", "tests.training:Regressor", "--set", "rtol=5"],
            "rtol must be a relative tolerance inside (0, 1), got 5",
        ),
        (["--module", "tests.training:Regressor", "--probe", "no.pt"], "there is no file 'no.pt'"),
        (["--module", "tests.training:Regressor", "--device", "nothing"], "'nothing' must be a device"),
        (
            ["--module", "tests.training:Regressor"],
            "checkpoints must be files of Lightning, or directories with *.ckpt",
        ),
    ],
)
def test_command_line_says_what_it_does_not_understand(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--log-dir", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.fits
def test_command_line_says_in_one_line_that_weights_do_not_fit(tmp_path, capsys):
    run(tmp_path, Regressor(), max_epochs=1)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--log-dir", str(tmp_path / "offline"), "--module", "tests.training:Scripted"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("python -m lightning_basin: error: Error(s) in loading")


def test_a_probe_file_of_something_else_is_said(tmp_path, capsys):
    torch.save({"inputs": 1}, tmp_path / "probe.pt")
    arguments = ["--module", "tests.training:Regressor", "--probe", str(tmp_path / "probe.pt")]
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--log-dir", str(tmp_path), *arguments])
    assert "probe.pt must hold a pair of inputs and targets, got dict" in capsys.readouterr().err
