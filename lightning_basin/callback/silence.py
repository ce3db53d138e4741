"""What a copy of a LightningModule must not do: log, write to its trainer, wait for other processes."""

import copy
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_basin.callback.lightnings import Callback, DummyLogger, LightningModule, Trainer
from lightning_basin.network.calls import call_module
from lightning_basin.settings import Behavior, Probabilities


def quiet_behavior(
    behavior: Callable[..., Any] | Literal["outputs", "probabilities"] | None, trainer: Trainer | None
) -> Behavior:
    """Return the behavior of a copy that finds its trainer, but logs nothing, and waits for no other process."""
    call = behavior if callable(behavior) else call_module

    def outputs(module: nn.Module, inputs: Any) -> Any:
        for submodule in module.modules():
            if isinstance(submodule, LightningModule) and vars(submodule).get("log") is not _ignore:
                _silence(submodule, trainer)
        with collectives_refused(trainer):
            return call(module, inputs)

    return Probabilities(outputs) if behavior == "probabilities" else outputs


def quiet_step(module: nn.Module, trainer: Trainer | None, objectives: list[Tensor]) -> None:
    """Let a copy run its training step without any effect."""
    for submodule in module.modules():
        if isinstance(submodule, LightningModule):
            _silence(submodule, trainer)
            vars(submodule).update(manual_backward=lambda loss, *_, **__: objectives.append(loss))


def quiet_loss(loss_fn: Any, trainer: Trainer | None) -> Any:
    """Return a loss that waits for no other process; what is no function stays as it is."""
    if trainer is None or trainer.world_size == 1 or not callable(loss_fn):
        return loss_fn

    def loss(outputs: Any, targets: Any) -> Any:
        with collectives_refused(trainer):
            return loss_fn(outputs, targets)

    return loss


def _silence(module: LightningModule, trainer: Trainer | None) -> None:
    """Let a copy log nothing, by itself, through its trainer or by a callback that owns one of its hooks."""
    of_the_run = (None if trainer is None else trainer.optimizers) or [torch.optim.SGD([torch.zeros(1)])]
    optimizers = [_IdleOptimizer(optimizer) for optimizer in of_the_run]
    vars(module).update(
        dict.fromkeys(_EFFECTS, _ignore),
        optimizers=lambda *_, **__: optimizers if len(optimizers) > 1 else optimizers[0],
        lr_schedulers=_Nothing,
    )
    for submodule in module.modules():
        for hook in (*submodule._forward_hooks.values(), *submodule._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Callback):
                vars(owner).update(log=_ignore, log_dict=_ignore)
    if trainer is not None:
        quiet_trainer = copy.copy(trainer)  # What is set in it does not reach the run.
        quiet_trainer.loggers = [DummyLogger() for _ in trainer.loggers]  # As in Trainer(fast_dev_run=True).
        module._trainer = quiet_trainer
        if trainer.world_size > 1:
            vars(module).update(all_gather=partial(_refuse_to_wait, "all_gather"))


_EFFECTS = ("log", "log_dict", "print", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
"""Methods of a LightningModule that act on the run."""


def _ignore(*_: Any, **__: Any) -> None:
    """Take the place of a method that acts on the run."""


class _Nothing:
    """Takes the place of an object: whatever is done with it has no effect."""

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


class _IdleOptimizer(_Nothing):
    """Moves no parameter, and has the class of an optimizer of the run: steps ask for it by `isinstance`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._type = type(optimizer)

    @property  # type: ignore[misc]  # what `isinstance` asks
    def __class__(self) -> Any:
        return self._type

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Only call the function that computes the loss."""
        return None if closure is None else closure()


def _refuse_to_wait(name: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(
        f"each process measures apart, and `{name}` would wait for the others: pass a behavior without it"
    )


_WAITS = re.compile("gather|reduce|broadcast|scatter|all_?to_?all|barrier|send|recv")
"""Names of the methods of a process group that wait for other processes."""


@contextmanager
def collectives_refused(trainer: Trainer | None) -> Iterator[None]:
    """Refuse, in this thread, whatever waits for other processes: all of it goes through a process group.

    A mode below autograd would need fewer lines, but inside of one no module can make a tensor of a subclass
    (torch 2.13).
    """
    if trainer is None or trainer.world_size == 1 or not torch.distributed.is_available():
        yield
        return
    thread, group = threading.get_ident(), torch.distributed.ProcessGroup

    def refusing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                _refuse_to_wait(name)
            return method(*args, **kwargs)

        return refused

    with ExitStack() as stack:
        for name, method in [*vars(group).items()]:
            if _WAITS.search(name) and callable(method):
                stack.callback(setattr, group, name, method)
                setattr(group, name, refusing(name, method))
        yield
