"""Modules whose evaluation mode cuts gradients off, measured as they train where that computes the same outputs.

LoRA layers merge their weights in ``eval()``, and some modules run under ``torch.set_grad_enabled(self.training)``.
Training gives their parameters a gradient and evaluation gives none: ranks would be too small, in silence.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_basin.network.layers import parameters_in_graph
from lightning_basin.network.network import ModuleBehavior, Network, call_module
from lightning_basin.network.replica import replicas
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.probe import Probe

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
    """Copies of which some modules are in training mode.

    Attributes:
        module: The copy to run.
        loss_fn: The loss, copied along.
        behavior: From the module and the inputs to outputs without dropout and batch statistics.
        note: Why this is measured.
    """

    module: nn.Module
    loss_fn: Any
    behavior: ModuleBehavior
    note: str


def as_trained(
    module: nn.Module,
    loss_fn: Any,
    behavior: ModuleBehavior | None,
    network: Network,
    probe: Probe,
    outputs: Tensor,
) -> AsTrained | None:
    """Find out whether evaluation mode cuts off parameters, and how to measure the module without that.

    Args:
        module: The module of the user, which stays as it is.
        loss_fn: The loss of the user, which may hold the module.
        behavior: From the module and the inputs to outputs; ``None`` calls the module.
        network: A copy in evaluation mode.
        probe: The inputs.
        outputs: Of the network on the first inputs, attached to the graph.

    Returns:
        ``None`` where evaluation mode cuts nothing off.

    Raises:
        ValueError: If it does, and the module does not compute the same outputs without it; or if no parameter is
            reached in any mode.
    """
    trained = {name for layer in network.layers for name in layer.parameters}
    unreached = trained - parameters_in_graph(outputs, network.named_parameters)
    if not unreached:
        return None
    few = probe.select(range(outputs.shape[0]))
    cut = unreached & _reached_in_training(module, loss_fn, behavior, few, network.dtype)
    for reached in _reached_by_others(network, probe, start=outputs.shape[0]):
        cut, unreached = cut - reached, unreached - reached
        if not cut and unreached < trained:
            break
    if cut:
        found = _without_cut(module, loss_fn, behavior, network, probe, cut)
        if found is not None:
            return found
        entered = network.passed(few).entering
        cut_layers = (layer.name for layer in network.layers if not cut.isdisjoint(layer.parameters))
        layers = [name for name in cut_layers if name in entered]
        if layers:
            raise ValueError(
                f"evaluation mode must not cut gradients off, but training reaches the parameters of the layers "
                f"{layers} and evaluation does not (by weights that eval() merges, set_grad_enabled(self.training) or "
                f"detach()), and in training mode the outputs differ: pass a behavior that computes those of "
                f"evaluation with gradients, or freeze these parameters by requires_grad_(False)"
            )
    if unreached == trained:
        raise ValueError(
            f"the outputs must depend on the trainable parameters, but none of these is in their graph: "
            f"{type(module).__name__} runs under no_grad or inference_mode, detaches its outputs, or uses no "
            f"parameter; pass behavior=lambda module, inputs: ... that computes the outputs with gradients"
        )
    return None


def _reached_in_training(
    module: nn.Module, loss_fn: Any, behavior: ModuleBehavior | None, few: Probe, dtype: torch.dtype
) -> set[str]:
    """Names of the parameters that training reaches; none where the module cannot be run so."""
    replica, _, behavior = replicas(module, loss_fn, behavior, dtype=dtype, training=True)
    network = Network(replica, behavior, dtype=dtype)
    try:
        return parameters_in_graph(network.outputs(few), network.named_parameters)
    except (TypeError, ValueError):
        return set()


def _reached_by_others(network: Network, probe: Probe, *, start: int) -> Iterator[set[str]]:
    """Names of the parameters that further inputs reach, a few at a time: those of an expert, say."""
    for first in range(start, probe.size, _FEW):
        try:
            outputs = network.outputs(probe.select(range(first, min(first + _FEW, probe.size))))
        except (TypeError, ValueError):
            outputs = network.outputs(probe)
            yield parameters_in_graph(outputs, network.named_parameters)
            return
        yield parameters_in_graph(outputs, network.named_parameters)


def _without_cut(
    module: nn.Module, loss_fn: Any, behavior: ModuleBehavior | None, network: Network, probe: Probe, cut: set[str]
) -> AsTrained | None:
    """The module in training mode but for what makes outputs random, if it then computes those of evaluation mode."""
    replica, loss_fn, behavior = replicas(module, loss_fn, behavior, dtype=network.dtype, training=True)
    for part in replica.modules():
        if type(part).__module__.startswith("torch.nn."):
            part.training = False
    call = call_module if behavior is None else behavior

    def outputs(module: nn.Module, inputs: Any) -> Tensor:
        with _EvaluationOfRandomness():
            return call(module, inputs)

    candidate = Network(replica, outputs, dtype=network.dtype)
    kept = [part for part in replica.modules() if part.training]
    if not _is_the_same(candidate, network, probe, cut):
        # Some are random by themselves: all go into evaluation mode that reach the same parameters there.
        for part in kept:
            part.training = False
            if type(part).train is not nn.Module.train or not cut <= _reached_by_all(candidate, probe, cut):
                part.training = True
        if not _is_the_same(candidate, network, probe, cut):
            return None
    names = [name for name, part in replica.named_modules() if part.training]
    layers = [layer.name for layer in network.layers if not cut.isdisjoint(layer.parameters)]
    return AsTrained(
        replica,
        loss_fn,
        outputs,
        f"evaluation mode cuts the layers {layers} off: the modules {names} are measured in training mode, in which "
        f"the outputs are the same, with dropout and batch statistics as in evaluation",
    )


def _is_the_same(candidate: Network, network: Network, probe: Probe, cut: set[str]) -> bool:
    """Whether a copy computes the outputs of another one, whenever it is run, and its graph holds some parameters."""
    with torch.no_grad():
        expected = network.outputs(probe).detach()
        found = [candidate.outputs(probe).detach() for _ in range(2)]
    tolerance = agreement_rtol(network.dtype) * float(expected.abs().max())
    agree = all(
        again.shape == expected.shape and bool(((again - expected).abs() <= tolerance).all()) for again in found
    )
    return agree and cut <= _reached_by_all(candidate, probe, cut)


def _reached_by_all(network: Network, probe: Probe, cut: set[str]) -> set[str]:
    """Names of the parameters that some input reaches; those that are looked for are enough."""
    found: set[str] = set()
    for reached in _reached_by_others(network, probe, start=0):
        found |= reached
        if cut <= found:
            break
    return found
