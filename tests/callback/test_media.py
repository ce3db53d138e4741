"""Figures and reports in loggers of other packages, offline: each with what it keeps on this machine."""

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_basin import BasinMonitor
from lightning_basin.history.page import read_page
from tests.lightning_packages import CometLogger, Logger, MLFlowLogger, WandbLogger
from tests.training import Regressor, loader, make_trainer, steps

pytestmark = [pytest.mark.fits, pytest.mark.figures]

FIGURES = ["1_rank", "2_null_space", "3_lost_rank_by_layer", "4_duplicates_by_layer"]


def fit(root, *loggers, **arguments):
    monitor = BasinMonitor(probe=20, **arguments)
    make_trainer(root, monitor, logger=list(loggers), max_epochs=1).fit(Regressor(), loader())
    return monitor


def is_png(path):
    return Path(path).read_bytes().startswith(b"\x89PNG")


def test_wandb_shows_figures_and_report(tmp_path):
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(tmp_path, logger)
    folder = Path(logger.experiment.dir) / "media"
    logger.experiment.finish()
    images = sorted((folder / "images" / "basin_figures").iterdir())
    assert ["_".join(path.stem.split("_")[:-2]) for path in images] == FIGURES
    assert all(map(is_png, images))
    (page,) = (folder / "html" / "basin").iterdir()
    assert read_page(page).steps.tolist() == [0, 3]


def test_mlflow_shows_figures_and_keeps_the_report(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # Else mlflow 3 wants a database.
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    fit(tmp_path, logger)
    folder = tmp_path / "mlruns" / logger.experiment_id / logger.run_id / "artifacts"
    assert read_page(folder / "report.html").steps.tolist() == [0, 3]
    # MLflow adds a small copy of each, in another format.
    images = sorted(path for path in (folder / "images").iterdir() if path.suffix == ".png")
    # `basin_figures~1_rank+step+2+timestamp+...`, at the step of Lightning's curves.
    assert [path.name.split("+")[:3] for path in images] == [[f"basin_figures~{name}", "step", "2"] for name in FIGURES]
    assert all(map(is_png, images))


class OfflineCometLogger(CometLogger):
    """Lightning 2.6 switches off what is offline, instead of writing it to a folder."""

    def _create_experiment(self):
        import comet_ml

        unwanted = (
            "auto_output_logging",
            "log_code",
            "log_env_details",
            "log_git_metadata",
            "log_git_patch",
            "parse_args",
        )
        quiet = dict.fromkeys(unwanted, False) | {"display_summary_level": 0}
        self._experiment = comet_ml.OfflineExperiment(offline_directory=self.save_dir, **quiet)


def name_of(upload):
    return upload.get("figName") or upload["fileName"]


def test_comet_shows_figures_and_keeps_the_report(tmp_path):
    pytest.importorskip("comet_ml")
    logger = OfflineCometLogger(online=False, offline_directory=str(tmp_path / "comet"))
    fit(tmp_path, logger)
    logger.experiment.end()
    (path,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        uploads = [message["payload"] for message in messages if message["type"] == "file_upload"]
        kept = {name_of(upload["additional_params"]): archive.read(upload["file_path"]) for upload in uploads}
    assert sorted(kept) == [*(f"basin_figures/{name}" for name in FIGURES), "report.html"]
    assert all(kept[f"basin_figures/{name}"].startswith(b"\x89PNG") for name in FIGURES)
    (tmp_path / "report.html").write_bytes(kept["report.html"])
    assert read_page(tmp_path / "report.html").steps.tolist() == [0, 3]


class MetricsOnly(Logger):
    """Knows what every logger must know, and nothing else."""

    name, version = "metrics", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Image:
    """As `trackio.Image`, which takes an array or a path."""

    def __init__(self, value, caption=None):
        self.value = value


class Html:
    """As `trackio.Html`, which takes a path or the text of a page."""

    def __init__(self, data, inject=True, data_is_not_path=False, caption=None):  # noqa: FBT002 - as it is published
        self.value = data


class Run:
    """As `trackio.Run`, which keeps what it is told."""

    def __init__(self):
        self.logged = []

    def log(self, metrics, step=None):
        self.logged.append((step, metrics))


class TrackioLogger(MetricsOnly):
    """As loggers for Trackio are written: its run is the experiment."""

    def __init__(self):
        super().__init__()
        self.experiment = Run()


def test_trackio_shows_figures_and_report(tmp_path, monkeypatch):
    package = SimpleNamespace(Image=Image, Html=Html)
    monkeypatch.setitem(__import__("sys").modules, "small_trackio", package)
    monkeypatch.setattr(Run, "__module__", "small_trackio.run")
    logger = TrackioLogger()
    fit(tmp_path, logger)
    logged = [(step, key, value.value) for step, metrics in logger.experiment.logged for key, value in metrics.items()]
    assert [(step, key) for step, key, _ in logged] == [
        *((2, f"basin_figures/{name}") for name in FIGURES),
        (2, "basin/report"),
    ]
    assert all(image.shape[2:] == (3,) and image.dtype == "uint8" for _, _, image in logged[:-1])
    assert read_page(Path(logged[-1][2])).steps.tolist() == [0, 3]


def test_a_logger_that_knows_numbers_only_gets_these_and_the_end_says_where_the_report_is(tmp_path, caplog):
    logger = MetricsOnly()
    with caplog.at_level("INFO"):
        monitor = fit(tmp_path, logger)
    assert [(step, row["basin/gradient_rank"]) for step, row in logger.rows if "basin/gradient_rank" in row] == [
        (log_step, record.gradient_rank) for log_step, record in zip([0, 2], monitor.records, strict=True)
    ]
    # Where Lightning puts the checkpoints of such a run.
    path = tmp_path / "metrics" / "version_0" / "report.html"
    assert read_page(path).steps.tolist() == steps(monitor) == [0, 3]
    assert f"The report: {path}" in caplog.text
    assert "HINT" not in caplog.text


class Failing(TrackioLogger):
    @staticmethod
    def log_image(key, images, step=None):
        raise ConnectionError("no answer")


def test_a_logger_that_does_not_take_its_figures_ends_no_fit(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, Failing())
    assert "Failing has no figures of BasinMonitor. ConnectionError: no answer. HINT: BasinMonitor(figures=False)" in (
        caplog.text
    )


class Remote(MetricsOnly):
    save_dir = "s3://bucket"


class Unreachable(MetricsOnly):
    @property
    def version(self):
        raise ConnectionError("no answer")


@pytest.mark.parametrize(
    ("logger_class", "said"), [(Remote, ""), (Unreachable, "no report. ConnectionError: no answer")]
)
def test_a_run_without_a_local_folder_has_no_report(tmp_path, caplog, logger_class, said):
    with caplog.at_level("INFO"):
        monitor = fit(tmp_path, logger_class())
    assert steps(monitor) == [0, 3]
    assert list(tmp_path.rglob("*.html")) == []
    assert "The report:" not in caplog.text
    assert said in caplog.text


def test_no_logger_gets_what_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "__module__", __name__)  # This file has an Image and an Html.
    logger = TrackioLogger()
    fit(tmp_path, logger, figures=False, report=False)
    assert logger.experiment.logged == []
    assert list(tmp_path.rglob("*.html")) == []
