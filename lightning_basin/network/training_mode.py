"""Modules whose evaluation mode cuts gradients off, measured as they train where that computes the same outputs.

LoRA layers merge their weights in ``eval()``, and some modules run under ``torch.set_grad_enabled(self.training)``.
Training gives their parameters a gradient and evaluation none, or another one: ranks would be too small, in silence.
"""

import pickle
import random
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_basin.network.layers import parameters_in_graph
from lightning_basin.network.network import ModuleBehavior, Network, call_module
from lightning_basin.network.remedies import is_out_of_memory
from lightning_basin.network.replica import replicas
from lightning_basin.network.rounding import agreement_rtol, rounding_rtol
from lightning_basin.probe import Probe
from lightning_basin.tensors import tensors_of

_FEW = 2  # inputs that are run at once; some modules cannot run a batch of one

_DROPOUTS = frozenset(
    f"{kind}dropout{suffix}"
    for kind in ("", "alpha_", "feature_", "feature_alpha_")
    for suffix in ("", "_", "1d", "2d", "3d")
)


class _EvaluationOfRandomness(TorchFunctionMode):
    """Inside this mode dropout does nothing and batch normalization takes its running statistics."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in _DROPOUTS and args:
            return args[0]
        if name == "batch_norm" and func is nn.functional.batch_norm and args[1] is not None:
            kwargs["training"] = False
        if name == "scaled_dot_product_attention" and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class AsTrained:
    """What to measure, so that the outputs have the gradients of training.

    Attributes:
        network: A copy of which some modules are in training mode; ``None`` for the one in evaluation mode.
        loss_fn: The loss, copied along.
        note: What should be known of it.
        unseen: Names of layers that are known to get a gradient in training, and on which the outputs do not depend.
    """

    network: Network | None = None
    loss_fn: Any = None
    note: str | None = None
    unseen: tuple[str, ...] = ()


def as_trained(
    module: nn.Module,
    loss_fn: Any,
    behavior: ModuleBehavior | None,
    network: Network,
    probe: Probe,
    outputs: Tensor,
    *,
    trained: Collection[str] = (),
) -> AsTrained:
    """Find out whether gradients of training are cut off from the outputs, and how to measure the module without that.

    Args:
        module: The module of the user, which stays as it is.
        loss_fn: The loss of the user, which may hold the module.
        behavior: From the module and the inputs to outputs; ``None`` calls the module.
        network: A copy in evaluation mode.
        probe: The inputs.
        outputs: Of the network on the first inputs, attached to the graph.
        trained: Names of parameters that are known to get a gradient in training.

    Raises:
        ValueError: If gradients are cut off, and the module does not compute the same outputs without that; or if no
            parameter is reached in any mode.
    """
    candidate, copied_loss = _in_training(module, loss_fn, behavior, network)
    few = probe.select(range(outputs.shape[0]))
    owned = {name for layer in candidate.layers for name in layer.parameters}
    unreached = owned - parameters_in_graph(outputs, network.named_parameters)
    unreached -= _reached_by(network, probe, unreached, start=few.size)
    move = partial(_move, module, behavior, network, probe)
    cut = unreached if move(unreached) else set()
    reached = cut & _reached_by(candidate, probe, cut)
    if not _is_the_same(candidate, network, few):
        _quieten(candidate, network, probe)
        reached |= cut & _reached_by(candidate, probe, cut)
    if unreached == owned and not reached:
        raise ValueError(
            f"the outputs must depend on the trainable parameters, but none of these is in their graph: "
            f"{type(module).__name__} runs under no_grad or inference_mode, detaches its outputs, or uses no "
            f"parameter; pass behavior=lambda module, inputs: ... that computes the outputs with gradients"
        )
    # Where evaluation uses an average of weights, and this is still equal to them, no output depends on them.
    changed = _changed(candidate, network, few, outputs) - (unreached - cut)
    found = AsTrained()
    if _is_mended(candidate, network, probe, reached, changed):
        found = AsTrained(candidate, copied_loss, _note(candidate, reached | changed))
    in_doubt = cut & set(trained) | reached
    if found.network is not None:
        in_doubt, changed = in_doubt - reached, set()
    refused = changed.union(*(part for part in _by_layer(candidate, in_doubt) if move(part)))
    if refused:
        raise ValueError(
            f"evaluation must not cut gradients off, but training reaches the parameters of the layers "
            f"{_layers(candidate, refused)}, and the outputs in evaluation mode have none or other gradients there (by "
            f"weights that eval() merges, set_grad_enabled(self.training), no_grad or detach()), and in training mode "
            f"other outputs, or none either: pass a behavior that computes those of evaluation with gradients, or "
            f"freeze these parameters by requires_grad_(False)"
        )
    if not trained and cut - reached:  # Training may well do the same, and leave them as they are.
        note = (
            f"the outputs depend on the layers {_layers(candidate, cut - reached)}, but have no gradient there "
            f"(no_grad or detach()): their ranks are 0"
        )
        found = replace(found, note=note if found.note is None else f"{found.note}; {note}")
    return replace(found, unseen=tuple(_layers(candidate, (unreached & set(trained)) - reached)))


def _by_layer(network: Network, names: set[str]) -> list[set[str]]:
    return [part for layer in network.layers if (part := names.intersection(layer.parameters))]


def _layers(network: Network, names: set[str]) -> list[str]:
    """Names of the layers to which some parameters belong."""
    return [layer.name for layer in network.layers if not names.isdisjoint(layer.parameters)]


def _note(candidate: Network, names: set[str]) -> str:
    parts = [name for name, part in candidate.module.named_modules() if part.training]
    return (
        f"evaluation mode cuts the layers {_layers(candidate, names)} off: the modules {parts} are measured in "
        f"training mode, in which the outputs are the same, with dropout and batch statistics as in evaluation"
    )


def _in_training(
    module: nn.Module, loss_fn: Any, behavior: ModuleBehavior | None, network: Network
) -> tuple[Network, Any]:
    """A copy in training mode but for what makes outputs random, and the loss; if there is none, that in evaluation."""
    try:
        replica, loss_fn, behavior = replicas(module, loss_fn, behavior, dtype=network.dtype, training=True)
    except Exception as error:  # Whatever the `train` of a user raises, of a module for predictions say.
        if is_out_of_memory(error):
            raise
        return network, loss_fn
    for part in replica.modules():
        if type(part).__module__.startswith("torch.nn."):
            part.training = False
    call = call_module if behavior is None else behavior

    def outputs(module: nn.Module, inputs: Any) -> Tensor:
        with _EvaluationOfRandomness():
            return call(module, inputs)

    return Network(replica, outputs, dtype=network.dtype, gradient_dtype=network.gradient_dtype), loss_fn


def _changed(candidate: Network, network: Network, few: Probe, outputs: Tensor) -> set[str]:
    """Names of the parameters by which equal outputs have another derivative in training mode than in evaluation."""
    try:
        others = candidate.outputs(few)
    except (TypeError, ValueError):
        return set()
    if not _agree(others, outputs, network.dtype):
        return set()
    names = [name for layer in candidate.layers for name in layer.parameters]
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(outputs)

    def gradients(outputs: Tensor, copy: Network) -> list[Tensor]:
        parameters = [copy.named_parameters.get(name, candidate.named_parameters[name]) for name in names]
        if not outputs.requires_grad:
            return [torch.zeros_like(parameter) for parameter in parameters]
        found = torch.autograd.grad(
            outputs, parameters, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(found)

    try:
        pairs = list(zip(gradients(others, candidate), gradients(outputs, network), strict=True))
    except RuntimeError as error:  # The measurement will meet it again, and say it.
        if is_out_of_memory(error):
            raise
        return set()
    rounding = rounding_rtol(network.dtype) * max(float(first.abs().max()) for first, _ in pairs)
    return {
        name
        for name, (first, second) in zip(names, pairs, strict=True)
        if float((first - second).abs().max()) > rounding + agreement_rtol(network.dtype) * float(first.abs().max())
    }


def _move(
    module: nn.Module, behavior: ModuleBehavior | None, network: Network, probe: Probe, names: Collection[str]
) -> bool:
    """Whether outputs in evaluation mode change with some parameters, as these are in training mode."""
    if not names:
        return False
    moved, behavior = replicas(module, behavior, dtype=network.dtype, training=True)
    generator, size = torch.Generator().manual_seed(0), agreement_rtol(network.dtype) ** 0.5
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in names:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                parameter += size * (float(parameter.abs().max()) or 1.0) * noise
        moved, behavior = replicas(moved, behavior, dtype=network.dtype)  # Into evaluation mode, weights merged anew.
        expected, again = (network.outputs(probe) for _ in range(2))
        found = Network(moved, behavior, dtype=network.dtype).outputs(probe)
    is_defined = _agree(again, expected, network.dtype)  # Else it is refused for that.
    return is_defined and not _agree(found, expected, network.dtype)


def _agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    if found.shape != expected.shape or found.numel() == 0:
        return found.shape == expected.shape
    difference, expected = (found - expected).detach().abs(), expected.detach().abs()
    return bool((difference <= agreement_rtol(dtype) * expected.max()).all())


def _reached_by(network: Network, probe: Probe, wanted: Collection[str], *, start: int = 0) -> set[str]:
    """Names of the parameters that some input reaches, a few at a time; those that are looked for are enough."""
    found: set[str] = set()
    first = start
    while first < probe.size and not found.issuperset(wanted):
        batch = probe.select(range(first, min(first + _FEW, probe.size)))
        first += _FEW
        try:
            results = tensors_of(network.called(batch))
        except ValueError:  # Some modules cannot run so few.
            first = probe.size
            with suppress(ValueError):
                results = tensors_of(network.called(probe))
        for result in results:
            found |= parameters_in_graph(result, network.named_parameters)
    return found


def _is_mended(candidate: Network, network: Network, probe: Probe, reached: set[str], changed: set[str]) -> bool:
    """Whether gradients are cut off, and a copy that computes the same outputs has them."""
    if not reached | changed or not _is_the_same(candidate, network, probe):
        return False
    return reached <= _reached_by(candidate, probe, reached)


def _quieten(candidate: Network, network: Network, probe: Probe) -> None:
    """Leave those parts in training mode, a kind at a time, with which the outputs are those of evaluation mode."""
    kinds: dict[type[nn.Module], list[nn.Module]] = {}
    for part in candidate.module.modules():
        if part.training:
            kinds.setdefault(type(part), []).append(part)

    def switch(parts: Iterable[nn.Module], *, training: bool) -> None:
        for part in parts:
            part.training = training

    switch(chain.from_iterable(kinds.values()), training=False)
    is_possible = _is_the_same(candidate, network, probe)
    if not is_possible:  # More than a flag goes with the mode of some.
        own = (parts for kind, parts in kinds.items() if kind.train is not nn.Module.train)
        switch(chain.from_iterable(own), training=True)
        is_possible = _is_the_same(candidate, network, probe)
    for parts in kinds.values():
        switch(parts, training=True)
        if is_possible and not _is_the_same(candidate, network, probe):
            switch(parts, training=False)


def _is_the_same(candidate: Network, network: Network, probe: Probe) -> bool:
    """Whether a copy computes the outputs of another one, and always will: a path that is rarely dropped may agree."""
    try:
        with torch.no_grad():
            expected = network.outputs(probe)
            before = _random_states(expected.device)
            found = [candidate.outputs(probe) for _ in range(2)]
    except (TypeError, ValueError):
        return False
    is_drawn = _random_states(expected.device) != before
    return not is_drawn and all(_agree(again, expected, network.dtype) for again in found)


def _random_states(device: torch.device) -> bytes:
    states: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy())
    return pickle.dumps(states)
