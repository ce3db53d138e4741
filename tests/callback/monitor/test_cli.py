"""LightningCLI builds the callbacks from a file, and writes a file that builds them again."""

import inspect
from importlib import import_module
from importlib.metadata import entry_points

import pytest
from torch import nn

from lightning_basin import BasinMonitor
from tests.lightning_packages import PACKAGE
from tests.training import Regressor, loader, steps

pytestmark = pytest.mark.fits

pytest.importorskip("jsonargparse")


LightningCLI = import_module(f"{PACKAGE}.cli").LightningCLI  # Needs jsonargparse as soon as it is imported.


ARGUMENTS = inspect.getdoc(BasinMonitor).partition("Args:")[2].partition("Raises:")[0]


CONFIG = """
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {root}
  callbacks:
    - class_path: lightning_basin.RankEarlyStopping
      init_args: {{monitor: written/gradient_rank, patience: 4}}
    - class_path: lightning_basin.BasinMonitor
      init_args:
        probe: 16
        loss_fn: {loss_fn}
        layers: [hidden]
        hessian: dense
        dtype: float64
        max_outputs: null
        verify_null_space: 2
        max_overhead: auto
        history: csv
        prefix: written
"""


def built(root, text):
    config = root / "config.yaml"
    config.write_text(text)
    return LightningCLI(Regressor, run=False, args=["--config", str(config)], save_config_callback=None)


def monitor_of(cli):
    return next(callback for callback in cli.trainer.callbacks if type(callback).__name__ == "BasinMonitor")


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [("torch.nn.functional.l1_loss", nn.functional.l1_loss), ("{class_path: torch.nn.L1Loss}", None)],
    ids=["function", "object"],
)
def test_monitor_of_a_file_measures_and_survives_being_written(tmp_path, loss_fn, expected):
    cli = built(tmp_path, CONFIG.format(root=tmp_path, loss_fn=loss_fn))
    written = cli.parser.dump(cli.config, skip_none=False)
    again = built(tmp_path, written)
    assert again.parser.dump(again.config, skip_none=False) == written
    monitor = monitor_of(again)
    assert monitor.loss_fn is expected or isinstance(monitor.loss_fn, nn.L1Loss)
    assert (monitor.layers, monitor.hessian, monitor.max_outputs) == (["hidden"], "dense", None)
    assert (monitor.verify_null_space, monitor.history, monitor.prefix) == (2, "csv", "written")
    assert monitor.max_overhead == "auto"
    again.trainer.fit(again.model, loader())
    assert steps(monitor) == [0, 3, 6]


def test_monitor_is_added_on_the_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tmp_path, loss_fn="behavioral").partition("  callbacks:")[0])
    arguments = ["--config", str(config), "--trainer.callbacks+=lightning_basin.BasinMonitor"]
    arguments += ["--trainer.callbacks.probe=16", "--trainer.callbacks.loss_fn=behavioral"]
    arguments += [
        "--trainer.callbacks.behavior=tests.callback.monitor.test_cli.doubled",
        "--trainer.callbacks.verify_null_space=zero_loss",
    ]
    cli = LightningCLI(Regressor, run=False, args=arguments, save_config_callback=None)
    monitor = monitor_of(cli)
    assert (monitor.loss_fn, monitor.behavior, monitor.verify_null_space) == ("behavioral", doubled, "zero_loss")
    cli.trainer.fit(cli.model, loader())
    assert steps(monitor) == [0, 3, 6]
    assert monitor.records[-1].hessian_nullity is not None


def doubled(module, inputs):
    return 2 * module(inputs)


class WithMonitor(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(BasinMonitor, "basin")
        parser.set_defaults({"basin.probe": 16, "basin.hessian": False})


def test_monitor_has_a_section_of_its_own(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tmp_path, loss_fn="behavioral").partition("  callbacks:")[0])
    arguments = ["--config", str(config), "--basin.every_n_epochs=2", "--basin.duplicates_over=train"]
    cli = WithMonitor(Regressor, run=False, args=arguments, save_config_callback=None)
    cli.trainer.fit(cli.model, loader())
    monitor = monitor_of(cli)
    assert steps(monitor) == [0, 6]
    assert [record.train_num_inputs for record in monitor.records] == [60, 60]


def test_the_precision_comes_from_the_command_line_and_goes_into_the_file(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tmp_path, loss_fn="behavioral").partition("  callbacks:")[0])
    arguments = ["--config", str(config), "--basin.dtype=float32"]
    with pytest.raises(SystemExit):
        WithMonitor(Regressor, run=False, args=[*arguments, "--print_config"])
    config.write_text(capsys.readouterr().out)
    cli = WithMonitor(Regressor, run=False, args=["--config", str(config)], save_config_callback=None)
    cli.trainer.fit(cli.model, loader())
    assert "evaluated in float32" in monitor_of(cli).records[-1].notes[-1]


def test_config_that_is_printed_builds_the_run_again(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tmp_path, loss_fn="torch.nn.functional.l1_loss"))
    with pytest.raises(SystemExit):
        LightningCLI(Regressor, run=False, args=["--config", str(config), "--print_config"])
    monitor = monitor_of(built(tmp_path, capsys.readouterr().out))
    assert (monitor.loss_fn, monitor.layers, monitor.prefix) == (nn.functional.l1_loss, ["hidden"], "written")


def test_no_trainer_gets_a_monitor_by_itself():
    factories = entry_points(group="lightning.pytorch.callbacks_factory")
    assert not [factory for factory in factories if "basin" in factory.value]


def test_help_says_what_the_docstring_says(tmp_path, capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Regressor, run=False, args=["--trainer.callbacks.help", "lightning_basin.BasinMonitor"])
    said = " ".join(capsys.readouterr().out.split())
    assert "The number of failures in a row after which measuring stops" in said
    undescribed = [name for name in inspect.signature(BasinMonitor).parameters if f"{name}:" not in ARGUMENTS]
    assert not undescribed
    assert not [name for name in inspect.signature(BasinMonitor).parameters if f".{name}" not in said]
