"""Modules whose evaluation mode cuts gradients off, measured in training mode where the outputs are the same.

LoRA layers merge their weights in ``eval()``, and some modules run under ``torch.set_grad_enabled(self.training)``.
Their parameters get a gradient in training, and none or another one in evaluation: the ranks would be too small, and
nothing would say so.
"""

import pickle
import random
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_basin.network.calls import ModuleBehavior
from lightning_basin.network.layers import parameters_in_graph
from lightning_basin.network.modes import in_training_mode, is_of_torch, names_in_training
from lightning_basin.network.network import Network
from lightning_basin.network.remedies import is_out_of_memory
from lightning_basin.network.replica import perturb, replicas
from lightning_basin.network.rounding import agree, agreement_rtol, rounding_rtol
from lightning_basin.probe import Probe
from lightning_basin.tensors import tensors_of

_CHUNK_SIZE = 2
"""Inputs that are run together; some modules cannot run a single one."""


@dataclass(frozen=True, eq=False)
class AsTrained:
    """What to measure, so that the outputs have the gradients of training.

    Attributes:
        network: A copy of which some modules are in training mode; ``None`` for the copy in evaluation mode.
        loss_fn: The loss, copied along.
        note: What a reader of the record should know; ``None`` for nothing.
        unseen: The names of layers that get a gradient in training, and on which the outputs do not depend.
        is_settled: Whether the same is found at other weights: no gradient that was compared was zero in both modes.
    """

    network: Network | None = None
    loss_fn: Any = None
    note: str | None = None
    unseen: tuple[str, ...] = ()
    is_settled: bool = True


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
    """Find out whether evaluation mode cuts gradients of training off, and how to measure the module without the cut.

    Args:
        module: The module of the user, which stays as it is.
        loss_fn: The loss of the user, which may hold the module.
        behavior: A function of the module and the inputs that returns the outputs; ``None`` calls the module.
        network: A copy in evaluation mode.
        probe: The inputs.
        outputs: The outputs of the network on the first inputs, attached to the graph.
        trained: The names of parameters that are known to get a gradient in training.

    Raises:
        ValueError: If gradients are cut off, and the module does not compute the same outputs without the cut; or if
            no parameter is reached in any mode.
    """
    candidate, copied_loss = _in_training(module, loss_fn, behavior, network)
    chunk = probe.select(range(outputs.shape[0]))
    owned = {name for layer in candidate.layers for name in layer.parameters}
    unreached = owned - parameters_in_graph(outputs, network.named_parameters)
    unreached -= _reached_by(network, probe, unreached, start=chunk.size)
    has_effect = partial(_has_effect, module, behavior, network, probe)
    cut = unreached if has_effect(unreached) else set()
    restored = cut & _reached_by(candidate, probe, cut)
    if candidate is not network and not _has_same_outputs(candidate, network, chunk):
        _reset_modes(candidate, network, probe)
        restored |= cut & _reached_by(candidate, probe, cut)
    if unreached == owned and not restored:
        raise ValueError(
            f"the outputs must depend on the trainable parameters, but none of these is in their graph: "
            f"{type(module).__name__} runs under no_grad or inference_mode, detaches its outputs, or uses no "
            f"parameter; pass behavior=lambda module, inputs: ... that computes the outputs with gradients"
        )
    # Where evaluation uses an average of weights, and it is still equal to them, no output depends on the weights.
    changed, is_settled = _with_other_gradients(candidate, network, chunk, outputs)
    changed -= unreached - cut
    result, doubtful = AsTrained(), cut & set(trained) | restored
    if _is_usable(candidate, network, probe, restored, changed):
        result = AsTrained(candidate, copied_loss, _note_of_modes(candidate, restored | changed))
        changed, doubtful = set(), doubtful - restored
    refused = changed.union(*(names for names in _by_layer(candidate, doubtful) if has_effect(names)))
    if refused:
        raise ValueError(_reason_to_refuse(_layers(candidate, refused)))
    if not trained and cut - restored:  # Training may well do the same, and leave them as they are.
        notes = [result.note, _note_of_cut(_layers(candidate, cut - restored))]
        result = replace(result, note="; ".join(filter(None, notes)))
    unseen = tuple(_layers(candidate, (unreached & set(trained)) - restored))
    return replace(result, unseen=unseen, is_settled=is_settled)


def _by_layer(network: Network, names: set[str]) -> list[set[str]]:
    by_layer = [names.intersection(layer.parameters) for layer in network.layers]
    return [names for names in by_layer if names]


def _layers(network: Network, names: set[str]) -> list[str]:
    """Return the names of the layers to which some parameters belong."""
    return [layer.name for layer in network.layers if not names.isdisjoint(layer.parameters)]


def _reason_to_refuse(layers: list[str]) -> str:
    return (
        f"evaluation must not cut gradients off, but training reaches the parameters of the layers {layers}, and the "
        f"outputs in evaluation mode have none or other gradients there (by weights that eval() merges, "
        f"set_grad_enabled(self.training), no_grad or detach()), and in training mode other outputs, or none either: "
        f"pass a behavior that computes those of evaluation with gradients, or freeze these parameters by "
        f"requires_grad_(False)"
    )


def _note_of_cut(layers: list[str]) -> str:
    return (
        f"the outputs depend on the layers {layers}, but have no gradient there (no_grad or detach()): their ranks are "
        f"0"
    )


def _note_of_modes(candidate: Network, names: set[str]) -> str:
    modules = [*names_in_training(candidate)]
    return (
        f"evaluation mode cuts the layers {_layers(candidate, names)} off: the modules {modules} are measured in "
        f"training mode, in which the outputs are the same, with dropout and batch statistics as in evaluation"
    )


def _in_training(
    module: nn.Module, loss_fn: Any, behavior: ModuleBehavior | None, network: Network
) -> tuple[Network, Any]:
    """Copy a module and the loss into training mode.

    Returns:
        The copies; the network in evaluation mode and the original loss where the module cannot be put into training
        mode, or where the modes differ in randomness alone.
    """
    if all(map(is_of_torch, network.module.modules())):
        return network, loss_fn
    try:
        return in_training_mode(module, loss_fn, behavior, dtype=network.dtype)
    except Exception as error:  # The `train` of a user may raise, for example of a module for predictions.
        if is_out_of_memory(error):
            raise
        return network, loss_fn


def _with_other_gradients(candidate: Network, network: Network, chunk: Probe, outputs: Tensor) -> tuple[set[str], bool]:
    """Return the names of the parameters whose gradients in training mode differ, although the outputs are equal.

    Returns:
        The names, and whether other weights would give the same: no gradient was zero in both modes, or no two were
        compared.
    """
    if candidate is network:
        return set(), True
    try:
        in_training = candidate.outputs(chunk)
    except (TypeError, ValueError):
        return set(), False
    if not agree(in_training, outputs, network.dtype):
        return set(), False
    names = [name for layer in candidate.layers for name in layer.parameters]
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(outputs)

    def gradients(outputs: Tensor, copy: Network) -> list[Tensor]:
        parameters = [copy.named_parameters.get(name, candidate.named_parameters[name]) for name in names]
        if not outputs.requires_grad:
            return [torch.zeros_like(parameter) for parameter in parameters]
        return list(
            torch.autograd.grad(
                outputs, parameters, weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    try:
        pairs = list(zip(gradients(in_training, candidate), gradients(outputs, network), strict=True))
    except RuntimeError as error:  # The measurement will meet it again, and say it.
        if is_out_of_memory(error):
            raise
        return set(), False
    sizes = torch.stack([torch.stack([first.abs().max(), (first - second).abs().max()]) for first, second in pairs])
    largest, differences = sizes.mT.tolist()
    rounding = rounding_rtol(network.dtype) * max(largest)
    changed = {
        name
        for name, size, difference in zip(names, largest, differences, strict=True)
        if difference > rounding + agreement_rtol(network.dtype) * size
    }
    return changed, all(size > 0 or difference > 0 for size, difference in zip(largest, differences, strict=True))


def _has_effect(
    module: nn.Module, behavior: ModuleBehavior | None, network: Network, probe: Probe, names: Collection[str]
) -> bool:
    """Return whether some parameters, changed in training mode, change the outputs in evaluation mode."""
    if not names:
        return False
    changed, behavior = replicas(module, behavior, dtype=network.dtype, training=True)
    perturb(changed, agreement_rtol(network.dtype) ** 0.5, names)
    with torch.no_grad():
        changed, behavior = replicas(changed, behavior, dtype=network.dtype)  # In evaluation mode weights merge anew.
        expected, again = (network.outputs(probe) for _ in range(2))
        outputs = Network(changed, behavior, dtype=network.dtype).outputs(probe)
    is_function = agree(again, expected, network.dtype)  # If not, the module is refused for this.
    return is_function and not agree(outputs, expected, network.dtype)


def _reached_by(network: Network, probe: Probe, names: Collection[str], *, start: int = 0) -> set[str]:
    """Return the parameters that some input reaches, in chunks of inputs until all of some names are reached."""
    reached: set[str] = set()
    first = start
    while first < probe.size and not reached.issuperset(names):
        chunk = probe.select(range(first, min(first + _CHUNK_SIZE, probe.size)))
        first += _CHUNK_SIZE
        results: list[Tensor] = []
        try:
            results = tensors_of(network.call(chunk))
        except ValueError:  # Some modules cannot run so few inputs.
            first = probe.size
            with suppress(ValueError):
                results = tensors_of(network.call(probe))
        for result in results:
            reached |= parameters_in_graph(result, network.named_parameters)
    return reached


def _is_usable(candidate: Network, network: Network, probe: Probe, restored: set[str], changed: set[str]) -> bool:
    """Return whether a copy in training mode computes the same outputs, and restores gradients that were cut off."""
    if not restored | changed or not _has_same_outputs(candidate, network, probe):
        return False
    return restored <= _reached_by(candidate, probe, restored)


def _reset_modes(candidate: Network, network: Network, probe: Probe) -> None:
    """Leave those modules in training mode, class by class, with which the outputs are those of evaluation mode."""
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for module in candidate.module.modules():
        if module.training:
            by_class.setdefault(type(module), []).append(module)

    def switch(modules: Iterable[nn.Module], *, training: bool) -> None:
        for module in modules:
            module.training = training

    switch(chain.from_iterable(by_class.values()), training=False)
    is_possible = _has_same_outputs(candidate, network, probe)
    if not is_possible:  # For some classes `train` does more than to set the flag.
        overriding = (modules for kind, modules in by_class.items() if kind.train is not nn.Module.train)
        switch(chain.from_iterable(overriding), training=True)
        is_possible = _has_same_outputs(candidate, network, probe)
    for modules in by_class.values():
        switch(modules, training=True)
        if is_possible and not _has_same_outputs(candidate, network, probe):
            switch(modules, training=False)


def _has_same_outputs(candidate: Network, network: Network, probe: Probe) -> bool:
    """Return whether a copy computes the outputs of another, without random numbers, which could agree by chance."""
    try:
        with torch.no_grad():
            expected = network.outputs(probe)
            before = _random_states(expected.device)
            results = [candidate.outputs(probe) for _ in range(2)]
    except (TypeError, ValueError):
        return False
    is_random = _random_states(expected.device) != before
    return not is_random and all(agree(result, expected, network.dtype) for result in results)


def _random_states(device: torch.device) -> bytes:
    states: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy())
    return pickle.dumps(states)
