"""The Lightning packages that are installed: ``lightning`` and ``pytorch_lightning`` have every class once each.

A name here stands for the classes of this name of all packages together, in annotations, ``isinstance`` and
``issubclass``. A trainer asks whether a callback is one of its own package: what inherits from ``BaseCallback`` is one
in all. Nothing else in this project imports a Lightning package.
"""

from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from operator import or_
from types import ModuleType
from typing import TYPE_CHECKING, Any


def _installed() -> list[ModuleType]:
    packages, problems = [], []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            packages.append(import_module(name))
        except Exception as problem:  # noqa: PERF203 - one that does not fit torch must not cost the other
            problems.append(problem)
    if not packages:
        raise problems[0]
    return packages


_PACKAGES = _installed()


def _each(module: str, name: str) -> tuple[Any, ...]:
    """Return the classes of a name, package by package; old packages lack some."""
    modules = (import_module(f"{package.__name__}.{module}") for package in _PACKAGES)
    return tuple(vars(imported)[name] for imported in modules if name in vars(imported))


def _base(classes: Sequence[Any]) -> Any:
    """Return a class that inherits from all of them, and is constructed as the first, whose attributes all have."""
    first, *others = classes
    silent = [type(first.__name__, (other,), {"__init__": _accept_nothing}) for other in others]
    return type(first.__name__, (first, *silent), {"__module__": __name__})


def _accept_nothing(_: object) -> None:
    """Ends the chain of constructors that ``super().__init__()`` of the first class begins."""


if TYPE_CHECKING:
    from lightning.fabric.utilities.exceptions import MisconfigurationException as MisconfigurationException
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
    from lightning.pytorch.callbacks import EarlyStopping as EarlyStopping
    from lightning.pytorch.callbacks import StochasticWeightAveraging as StochasticWeightAveraging
    from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason as EarlyStoppingReason
    from lightning.pytorch.loggers import CSVLogger as CSVLogger
    from lightning.pytorch.loggers import Logger as Logger
    from lightning.pytorch.loggers import MLFlowLogger as MLFlowLogger
    from lightning.pytorch.loggers import TensorBoardLogger as TensorBoardLogger
    from lightning.pytorch.loggers.logger import DummyLogger as DummyLogger
    from lightning.pytorch.profilers import Profiler as Profiler
    from lightning.pytorch.strategies import DeepSpeedStrategy as DeepSpeedStrategy
    from lightning.pytorch.strategies import FSDPStrategy as FSDPStrategy
    from lightning.pytorch.strategies import ModelParallelStrategy as ModelParallelStrategy
    from lightning.pytorch.strategies import Strategy as Strategy

    BaseCallback = Callback
    BaseEarlyStopping = EarlyStopping
else:
    Callback = reduce(or_, _each("callbacks", "Callback"))
    EarlyStopping = reduce(or_, _each("callbacks", "EarlyStopping"))
    EarlyStoppingReason = reduce(or_, _each("callbacks.early_stopping", "EarlyStoppingReason"))
    StochasticWeightAveraging = reduce(or_, _each("callbacks", "StochasticWeightAveraging"))
    LightningModule = reduce(or_, _each("core", "LightningModule"))
    Trainer = reduce(or_, _each("trainer", "Trainer"))
    Logger = reduce(or_, _each("loggers", "Logger"))
    MLFlowLogger = reduce(or_, _each("loggers", "MLFlowLogger"))
    Profiler = reduce(or_, _each("profilers", "Profiler"))
    Strategy = reduce(or_, _each("strategies", "Strategy"))
    DeepSpeedStrategy = reduce(or_, _each("strategies", "DeepSpeedStrategy"))
    FSDPStrategy = reduce(or_, _each("strategies", "FSDPStrategy"))
    ModelParallelStrategy = reduce(or_, _each("strategies", "ModelParallelStrategy"))

    CSVLogger, TensorBoardLogger = _each("loggers", "CSVLogger")[0], _each("loggers", "TensorBoardLogger")[0]
    DummyLogger = _each("loggers.logger", "DummyLogger")[0]
    BaseCallback = _base(_each("callbacks", "Callback"))
    BaseEarlyStopping = _base(_each("callbacks", "EarlyStopping"))

    class MisconfigurationException(*_each("utilities.exceptions", "MisconfigurationException")):
        """What every package raises, and so every program catches, where settings do not fit together."""


EARLY_STOPPINGS: tuple[type[EarlyStopping], ...] = _each("callbacks", "EarlyStopping")
"""One class of each package."""


TENSORBOARD_LOGGERS: tuple[type[TensorBoardLogger], ...] = _each("loggers", "TensorBoardLogger")
"""The same of the loggers for TensorBoard."""


def early_stopping_reasons(trainer: Any = None) -> type[EarlyStoppingReason]:
    """Return the reasons to stop of a trainer's package, else of the first: members of two packages are never equal."""
    package = next((package for package in _PACKAGES if isinstance(trainer, package.Trainer)), _PACKAGES[0])
    reasons: type[EarlyStoppingReason] = import_module(
        f"{package.__name__}.callbacks.early_stopping"
    ).EarlyStoppingReason
    return reasons


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, which a connector of lightning 2.6 sets."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def plain_state(callback: Callback) -> dict[str, Any]:
    """Return the attributes of a callback without the methods of the module that Lightning hangs onto it."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
