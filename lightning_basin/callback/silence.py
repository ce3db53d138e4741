"""What a copy of a LightningModule must not do: log, write to its trainer, wait for other processes."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_basin.callback.lightnings import Callback, LightningModule, Logger, Trainer
from lightning_basin.network.network import call_module
from lightning_basin.settings import Behavior, Probabilities


def quiet_behavior(
    behavior: Callable[..., Any] | Literal["outputs", "probabilities"] | None, trainer: Trainer | None
) -> Behavior:
    """The behavior, on a copy that still finds its trainer and loggers but logs nothing, and waits for nobody.

    Args:
        behavior: As `BasinMonitor` takes it.
        trainer: ``None`` outside of a fit.
    """
    call = behavior if callable(behavior) else call_module

    def outputs(module: nn.Module, inputs: Any) -> Any:
        for part in module.modules():
            if isinstance(part, LightningModule) and vars(part).get("log") is not _ignore:
                _silence(part, trainer)
        with collectives_refused(trainer):
            return call(module, inputs)

    return Probabilities(outputs) if behavior == "probabilities" else outputs


def quiet_step(module: nn.Module, trainer: Trainer | None, objectives: list[Tensor]) -> None:
    """Let a copy run its training step without any effect.

    Args:
        module: The copy.
        trainer: ``None`` outside of a fit.
        objectives: Takes what the step hands to its manual backward passes.
    """
    for part in module.modules():
        if isinstance(part, LightningModule):
            _silence(part, trainer)
            vars(part).update(manual_backward=lambda loss, *_, **__: objectives.append(loss))


def quiet_loss(loss_fn: Any, trainer: Trainer | None) -> Any:
    """A loss that waits for nobody; anything else than a function stays as it is.

    Args:
        loss_fn: As `measure_basin` takes it.
        trainer: ``None`` outside of a fit.
    """
    if trainer is None or trainer.world_size == 1 or not callable(loss_fn):
        return loss_fn

    def loss(outputs: Any, targets: Any) -> Any:
        with collectives_refused(trainer):
            return loss_fn(outputs, targets)

    return loss


def _silence(module: LightningModule, trainer: Trainer | None) -> None:
    """Let a copy log nothing, by itself, through its trainer or by a callback of which it has a hook."""
    of_the_run = (None if trainer is None else trainer.optimizers) or [torch.optim.SGD([torch.zeros(1)])]
    optimizers = [_QuietOptimizer(optimizer) for optimizer in of_the_run]
    vars(module).update(
        dict.fromkeys(_EFFECTS, _ignore),
        optimizers=lambda *_, **__: optimizers if len(optimizers) > 1 else optimizers[0],
        lr_schedulers=_Nothing,
    )
    for part in module.modules():
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Callback):
                vars(owner).update(log=_ignore, log_dict=_ignore)
    if trainer is not None:
        module._trainer = _QuietTrainer(trainer)  # type: ignore[assignment]  # all that a copy asks of a trainer
        if trainer.world_size > 1:
            vars(module).update(all_gather=partial(_refuse_to_wait, "all_gather"))


_EFFECTS = ("log", "log_dict", "print", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
"""Methods of a LightningModule that act on the run."""


class _StandIn:
    """Has the attributes of another object, and its class for `isinstance`; what is set in it does not reach that."""

    def __init__(self, original: Any) -> None:
        self._original = original

    @property
    def __class__(self) -> Any:
        return type(self._original)

    @__class__.setter
    def __class__(self, _: Any) -> None:
        raise TypeError("what stands in for another object keeps its class")

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_original"], name)


class _QuietTrainer(_StandIn):
    """A trainer as a copy finds it: what is asked of it is the run's, what is set in it or logged reaches nobody."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.loggers = [_QuietLogger(logger) for logger in trainer.loggers]
        self.logger = self.loggers[0] if self.loggers else None


class _QuietLogger(_StandIn):
    """A logger with the places and names of another one, that does nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        self.experiment = _Nothing()

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return _ignore if callable(value) else value


class _Nothing:
    """Takes whatever is done with the object behind a logger."""

    def __getattr__(self, name: str) -> "_Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> "_Nothing":
        return self

    def __getitem__(self, _: Any) -> "_Nothing":
        return self

    def __setitem__(self, _: Any, __: Any) -> None:
        """Nothing is kept."""

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was opened."""


class _QuietOptimizer(_Nothing, _StandIn):
    """An optimizer that moves no parameter, of the class of another one."""

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Only run what computes the loss."""
        return None if closure is None else closure()


def _ignore(*_: Any, **__: Any) -> None:
    """Takes the place of a method that would log."""


def _refuse_to_wait(name: str, *_: Any, **__: Any) -> None:
    """Takes the place of what would wait for the other processes, which are not at the same place."""
    raise RuntimeError(
        f"each process measures apart, and `{name}` would wait for the others: pass a behavior without it"
    )


_WAITS = re.compile("gather|reduce|broadcast|scatter|all_?to_?all|barrier|send|recv")


@contextmanager
def collectives_refused(trainer: Trainer | None) -> Iterator[None]:
    """Refuse, in this thread, whatever waits for other processes: all of it goes through a process group."""
    if trainer is None or trainer.world_size == 1 or not torch.distributed.is_available():
        yield
        return
    thread, group = threading.get_ident(), torch.distributed.ProcessGroup
    methods = {name: method for name, method in vars(group).items() if _WAITS.search(name) and callable(method)}

    def refusing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                _refuse_to_wait(name)
            return method(*args, **kwargs)

        return refused

    try:
        for name in methods:
            setattr(group, name, refusing(name, getattr(group, name)))
        yield
    finally:
        for name, method in methods.items():
            setattr(group, name, method)
