"""One random combination of all rows of the gradients, which each way to find them must reproduce."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from lightning_basin.functional.duplicates import largest_entry
from lightning_basin.functional.gradients import LayerGradients, StackedGradients
from lightning_basin.naming import escaped
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import agreement_rtol, rounding_noise
from lightning_basin.network.runs import Chunk, TracedProbe

_ROUNDING = 4  # rounding units, times the root of the number of rows: by so much sums over all rows may differ
_NOISE_MARGIN = 8  # of a measured noise: three evaluations may by chance show so much less than there is
_CLEAR_RTOL = 1e-3  # of a combination: what rounding of its terms can be where it is clearly not all of it


@dataclass(frozen=True, eq=False)
class MeasuredGradients:
    """Behavioral gradients of one layer.

    Attributes:
        layer: Whose.
        gradients: Rows ordered by input, then output, in the network's ``gradient_dtype``.
        structured: Whether they come from the operations that use the layer, and not from dense rows.
        note: What a reader should know about how they were obtained.
    """

    layer: Layer
    gradients: LayerGradients
    structured: bool
    note: str | None = None


class AutogradCheck:
    """One random combination of all rows of every layer's gradients, which each way must reproduce.

    What the operations that use a layer give may differ by rounding only, so that no use is missed, however weak.

    Args:
        traced: The network on the probe.
        generator: On the CPU; for the combination, with standard normal weights.
    """

    def __init__(self, traced: TracedProbe, generator: Generator) -> None:
        network, outputs = traced.network, traced.network.rows(traced.whole.outputs)
        parameters = network.parameters()
        sizes = [chunk.probe.size for chunk in traced.chunks()]
        drawn = [torch.randn(size, outputs.shape[1], generator=generator, dtype=torch.float64) for size in sizes]
        weights = torch.cat(drawn).to(outputs.device)
        combined: list[Tensor | None] = [None] * len(parameters)
        for found in traced.each(_combined_rows, weights):
            combined = [_sum(total, part) for total, part in zip(combined, found, strict=True)]
        self._traced = traced
        self._drawn = weights
        self._weights = weights.flatten()
        names = [name for layer in network.layers for name in layer.parameters]
        self._expected = dict(zip(names, combined, strict=True))
        self._shapes = dict(zip(names, parameters, strict=True))
        if not all(bool(gradient.isfinite().all()) for gradient in combined if gradient is not None):
            _refuse_infinite_gradients(traced)

    @property
    def num_rows(self) -> int:
        """Outputs on all inputs, m."""
        return self._weights.numel()

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self._weights.device

    def norm(self, layers: Iterable[Layer]) -> float:
        """Of the combination by the parameters of some layers; its mean square is that of the Frobenius norm."""
        found = [self._expected[name] for layer in layers for name in layer.parameters]
        norms = [combined.norm() for combined in found if combined is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0

    def is_unused(self, layer: Layer) -> bool:
        """Whether no output depends on the layer."""
        return all(self._expected[name] is None for name in layer.parameters)

    def measured(
        self, layer: Layer, gradients: LayerGradients, *, structured: bool, note: str | None = None
    ) -> MeasuredGradients | None:
        """Gradients that have the combination which autograd finds; zero ones if that is rounding; ``None`` for others.

        Args:
            layer: Whose they are.
            gradients: To check.
            structured: Whether they come from the operations that use the layer.
            note: What a reader should know about them.
        """
        dtype = self._traced.network.dtype
        sizes = [self._shapes[name].numel() for name in layer.parameters]
        found = torch.split(gradients.combination(self._weights), sizes)
        pairs = list(zip(found, self._wanted(layer), strict=True))
        differences = [largest_entry(combined - wanted) for combined, wanted in pairs]
        scales = [largest_entry(wanted) for _, wanted in pairs]
        rounding = _ROUNDING * len(self._weights) ** 0.5 * torch.finfo(dtype).eps
        loosest = [agreement_rtol(dtype) * scale for scale in scales]
        tolerances = [rounding * scale for scale in scales] if structured else loosest
        is_close = _none_exceeds(differences, tolerances)
        if not is_close and structured:  # Terms may cancel in a parameter, as in the bias of a key before a softmax.
            unit = _ROUNDING * torch.finfo(dtype).eps
            terms = torch.split(gradients.magnitudes().combination(self._weights.abs()), sizes)
            roundings = [unit * largest_entry(magnitudes) for magnitudes in terms]
            is_close = _none_exceeds(differences, list(map(max, tolerances, roundings)))
            # What is no more than rounding as a whole is nothing.
            is_close &= unit * _norm(terms) <= _CLEAR_RTOL * _norm([wanted for _, wanted in pairs])
        if not is_close:
            noise = [self._noise[name] for name in layer.parameters]
            if _norm([wanted for _, wanted in pairs]) <= _NOISE_MARGIN * _norm(noise):
                empty = no_gradients(layer, self.num_rows, self.device)
                return MeasuredGradients(layer, empty, structured, _without_effect(layer))
            noisy = [_NOISE_MARGIN * largest_entry(deviation) for deviation in noise]
            # Rounding that spoils nine digits is not told from a formula that is wrong.
            limits = map(min, noisy, loosest) if structured else noisy
            is_close = _none_exceeds(differences, list(map(max, tolerances, limits)))
        return MeasuredGradients(layer, gradients, structured, note) if is_close else None

    def _wanted(self, layer: Layer) -> list[Tensor]:
        """The combination by each parameter, flattened."""
        return [
            (self._weights.new_zeros(self._shapes[name].shape) if wanted is None else wanted).flatten()
            for name in layer.parameters
            for wanted in [self._expected[name]]
        ]

    @cached_property
    def _noise(self) -> dict[str, Tensor]:
        """How far rounding may have moved the combination, by the name of each parameter."""
        noise = rounding_noise(self._combined, self._traced.network.dtype)
        return dict(zip(self._expected, noise, strict=True))

    def _combined(self) -> list[Tensor]:
        network = self._traced.network
        parameters = network.parameters()
        combined = [self._weights.new_zeros(parameter.shape) for parameter in parameters]
        for chunk in self._traced.chunks():
            outputs = network.rows(network.outputs(chunk.probe))
            if outputs.requires_grad:
                weights = self._drawn[chunk.indices.to(self.device)].to(outputs)
                found = torch.autograd.grad(outputs, parameters, weights, materialize_grads=True)
                combined = [total + gradient for total, gradient in zip(combined, found, strict=True)]
        return combined


def _refuse_infinite_gradients(traced: TracedProbe) -> None:
    """Say on which inputs, and in which layers, gradients of finite outputs are not finite.

    Raises:
        ValueError: Always.
    """
    network, parameters = traced.network, traced.network.parameters()
    owners = [layer.name for layer in network.layers for _ in layer.parameters]
    layers: dict[str, None] = {}
    inputs: list[int] = []
    for index in range(traced.probe.size):
        try:  # Alone, as what is not finite spoils all inputs of a batch.
            row = network.rows(network.outputs(traced.probe.select([index])))
        except (TypeError, ValueError):  # Some modules cannot run one.
            row = network.rows(network.outputs(traced.probe))[index]
        found = torch.autograd.grad(row.sum(), parameters, allow_unused=True)
        is_bad = [gradient is not None and not bool(gradient.isfinite().all()) for gradient in found]
        layers |= {name: None for name, bad in zip(owners, is_bad, strict=True) if bad}
        inputs += [index] if any(is_bad) else []
    raise ValueError(
        f"gradients must be finite, but are NaN or infinite in the layers {list(layers)} on {len(inputs)} of the "
        f"{traced.probe.size} inputs, the first of them input {inputs[0] if inputs else 0}, although all outputs are "
        f"finite: keep sqrt, log, division and norm away from 0 also where torch.where or a mask does not take them "
        f"(by clamp, before), attention away from sets that are all padding, or leave these inputs out"
    )


def _none_exceeds(values: Sequence[Tensor], limits: Sequence[Tensor]) -> bool:
    return all(bool(value <= limit) for value, limit in zip(values, limits, strict=True))


def _without_effect(layer: Layer) -> str:
    name = escaped(layer.name)
    return f"layer {name!r} has no effect: its gradients are the rounding of terms that cancel, and count as zero"


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def no_gradients(layer: Layer, num_rows: int, device: torch.device) -> LayerGradients:
    """Return a matrix of zeros for a layer."""
    return StackedGradients((), (), num_rows=num_rows, num_columns=layer.num_parameters, device=device)


def _combined_rows(network: Network, chunk: Chunk, weights: Tensor) -> list[Tensor | None]:
    """By each parameter the derivative of the outputs with some weights; ``None`` where none depends on it."""
    outputs, parameters = network.rows(chunk.trace.outputs), network.parameters()
    if not outputs.requires_grad:
        return [None] * len(parameters)
    weights = weights[chunk.indices.to(weights.device)].to(outputs)
    return list(torch.autograd.grad(outputs, parameters, weights, retain_graph=True, allow_unused=True))


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if part is None:
        return total
    part = part.to(torch.float64)
    return part if total is None else total + part


def disagreement(names: Sequence[str]) -> str:
    """Say that no way to find the gradients of some layers reproduces those of autograd."""
    return (
        f"the gradients of layers {[*map(escaped, names)]} cannot be computed: two evaluations of them disagree; a "
        f"hook on a tensor that changes gradients, or a backward pass that draws random numbers, has this effect"
    )
