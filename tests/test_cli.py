"""LightningCLI builds the callbacks from a file, and writes a file that builds them again."""

import pytest
from torch import nn

from tests.training import Regressor, loader, steps

pytest.importorskip("jsonargparse")
from lightning.pytorch.cli import LightningCLI  # Needs jsonargparse as soon as it is imported.

pytestmark = pytest.mark.usefixtures("one_thread")

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
        max_outputs: null
        verify_null_space: 2
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
    again.trainer.fit(again.model, loader())
    assert steps(monitor) == [0, 3, 6]


def test_help_says_what_the_docstring_says(tmp_path, capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Regressor, run=False, args=["--trainer.callbacks.help", "lightning_basin.BasinMonitor"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Stop measuring after so many failures in a row" in said
