"""Figures and pages for loggers that take them: by the methods that a logger has, whatever its class."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_basin.callback.lightnings import Logger
from lightning_basin.callback.loggers import mlflow_name

ImageWriter = Callable[[str, NDArray[np.uint8], int], object]
"""Takes a key, an image of shape ``(height, width, 3)``, and the place on the x axis."""

PageWriter = Callable[[str, Path, int], object]
"""Takes a key, the path of a page, and the place on the x axis."""


def image_writer(logger: Logger) -> ImageWriter | None:
    """Return a function that hands an image to a logger; ``None`` for a logger that takes none."""
    log: Any = logger
    experiment: Any = getattr(log, "experiment", None)
    if hasattr(experiment, "add_image"):  # TensorBoard.
        return lambda key, image, step: experiment.add_image(key, image, step, dataformats="HWC")
    if hasattr(log, "log_image"):  # W&B, and what follows its logger.
        return lambda key, image, step: log.log_image(key, [image], step=step)
    if hasattr(experiment, "log_image") and hasattr(log, "run_id"):  # MLflow.
        return lambda key, image, step: experiment.log_image(log.run_id, image, key=mlflow_name(key), step=step)
    if hasattr(experiment, "log_image") and hasattr(experiment, "log_asset"):  # Comet, which stretches arrays.
        return lambda key, image, step: experiment.log_image(_picture(image), name=key, step=step)
    make = _medium(experiment, "Image")
    if make is not None and hasattr(experiment, "log"):  # Trackio.
        return lambda key, image, step: experiment.log({key: make(image)}, step=step)
    return None


def _picture(image: NDArray[np.uint8]) -> Any:
    from PIL import Image  # Comes with matplotlib, without which there is no image.

    return Image.fromarray(image)


def page_writer(logger: Logger) -> PageWriter | None:
    """Return a function that hands a page to a logger; ``None`` for a logger that takes none."""
    log: Any = logger
    experiment: Any = getattr(log, "experiment", None)
    if hasattr(experiment, "log_artifact") and hasattr(log, "run_id"):  # MLflow.
        return lambda _, path, __: experiment.log_artifact(log.run_id, str(path))
    if hasattr(experiment, "log_asset"):  # Comet.
        return lambda _, path, step: experiment.log_asset(str(path), file_name=path.name, overwrite=True, step=step)
    make = _medium(experiment, "Html")
    if make is None or not hasattr(experiment, "log"):
        return None
    if hasattr(log, "log_image"):  # W&B: its logger, not its run, knows how a step is written.
        return lambda key, path, step: log.log_metrics({key: make(str(path), inject=False)}, step=step)
    return lambda key, path, step: experiment.log({key: make(str(path), inject=False)}, step=step)  # Trackio.


def _medium(experiment: object, name: str) -> Callable[..., Any] | None:
    """Return a class of the package that an experiment is of: W&B and Trackio have one for each kind of file."""
    package = sys.modules[type(experiment).__module__.partition(".")[0]]
    return getattr(package, name, None)
