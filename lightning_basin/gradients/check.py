"""One random combination of all rows of the gradients, which each method of finding them must reproduce."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gradients import LayerGradients, StackedGradients
from lightning_basin.gradients.terms import compare_backward_passes, sum_term_magnitudes
from lightning_basin.naming import escaped
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import agreement_rtol, in_other_precision
from lightning_basin.network.runs import Chunk, ProbeRuns
from lightning_basin.tensors import as_result, float64_device

_ROUNDING = 4
"""Rounding units by which a sum may be off, relative to the sum of the magnitudes of its terms."""

_SMALLEST = 1e-300  # a divisor in place of zero

_RESOLVED = 1e-3
"""Largest share of a combination that its rounding may be, where a structured gradient is still believed."""

_GRID = 2**12  # inverse of the distance of weights in float32, which holds their differences up to 2**12, too

_SPLIT_SEED = 3141592653  # a seed that nobody takes: the same weights again would leave nothing to add

_PASSES = 8
"""Largest ratio of two differences between backward passes that are rounding; up to 3.4 was seen in 4 to 100 layers."""

_ONLY_ROUNDING = 2.0**20
"""Ratio of a combination in float32 to that in float64 from which on both are rounding, whose units differ by 2^29."""


@dataclass(frozen=True, eq=False)
class MeasuredGradients:
    """Behavioral gradients of one layer, as autograd confirms them.

    Attributes:
        layer: The layer.
        gradients: The gradients, rows ordered by input, then output, in the network's ``gradient_dtype``.
        structured: Whether they come from the operations that use the layer, and not from dense rows.
        note: The record's note on how they were obtained; ``None`` for nothing.
    """

    layer: Layer
    gradients: LayerGradients
    structured: bool
    note: str | None = None


class AutogradCheck:
    """One random combination of all rows of every layer's gradients, which each method must reproduce.

    The weights of the combination are standard normal. Gradients that are not finite are refused.
    """

    def __init__(self, runs: ProbeRuns, generator: Generator) -> None:
        outputs = runs.network.rows(runs.full_trace.outputs)
        sizes = [chunk.probe.size for chunk in runs.chunks()]
        self._runs = runs
        self._weights = torch.cat([self._draw((size, outputs.shape[1]), generator) for size in sizes])
        self._weights = self._weights.to(float64_device(outputs.device))
        self._combined = _combination(runs, self._weights)
        self._norms = _norms(self._combined)
        # A norm may be infinite although all elements are finite.
        known = [gradient for gradient in self._combined.values() if gradient is not None]
        if not math.isfinite(sum(self._norms.values())) and not all(bool(tensor.isfinite().all()) for tensor in known):
            _refuse_infinite_gradients(runs)

    def _draw(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Draw weights, which the network's type holds exactly, as it does their differences: rows may cancel."""
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn if self._runs.network.dtype == torch.float64 else drawn.mul_(_GRID).round_().div_(_GRID)

    @property
    def num_rows(self) -> int:
        """Outputs on all inputs, m."""
        return self._weights.numel()

    @property
    def device(self) -> torch.device:
        """The device of the gradients."""
        return self._weights.device

    def norm(self, layers: Iterable[Layer]) -> float:
        """The norm of the combination by the parameters of some layers.

        The mean of its square over all combinations is the square of the gradients' Frobenius norm.
        """
        return _norm(self._norms, layers)

    def is_unused(self, layer: Layer) -> bool:
        """Whether no output depends on the layer."""
        return all(self._combined[name] is None for name in layer.parameters)

    def confirm(
        self, gradients: Mapping[Layer, LayerGradients], *, structured: bool, notes: Mapping[Layer, str | None]
    ) -> dict[Layer, MeasuredGradients]:
        """Accept gradients whose random combination is that of autograd.

        The combinations may differ by rounding in their norm, which bounds how far singular values move. In a deep
        network they may differ as much as backward passes that must add up. Where terms cancel, they may differ by the
        rounding of the terms. Where autograd's combination is no more than rounding, the layer has no effect, and zero
        gradients. Of structured gradients only rounding is allowed for, so that no use is missed, however weak.
        """
        rtol = self._structured_rtol if structured else agreement_rtol(self._runs.network.dtype)
        differences = self._differences(gradients)
        doubtful = [layer for layer, difference in differences.items() if not difference <= rtol]
        rounding = self._rounding_of_passes(doubtful) if structured and doubtful else {}
        confirmed = {}
        for layer, difference in differences.items():
            measured = MeasuredGradients(layer, gradients[layer], structured, notes.get(layer))
            if difference <= max(rtol, rounding.get(layer, 0.0)):
                confirmed[layer] = measured
            elif (replaced := self._confirm_by_terms(measured)) is not None:
                confirmed[layer] = replaced
        return confirmed

    @property
    def _structured_rtol(self) -> float:
        """How far rounding moves a sum over all rows, relative to its norm."""
        return _ROUNDING * torch.finfo(self._runs.network.dtype).eps * math.sqrt(self.num_rows)

    def _differences(self, gradients: Mapping[Layer, LayerGradients]) -> dict[Layer, float]:
        """The norm of the difference from autograd's combination, relative to the norm of that one, of each layer.

        All are read together, as a device waits at each transfer.
        """
        if not gradients:
            return {}
        expected = [self._expected(layer) for layer in gradients]
        differences = [
            self._difference(found, target) for found, target in zip(gradients.values(), expected, strict=True)
        ]
        # The largest elements become 1, as squares of very small or large ones leave the range of float64.
        scales = torch._foreach_clamp_min(torch._foreach_norm(expected, math.inf), _SMALLEST)
        norms = torch._foreach_norm(torch._foreach_div([*differences, *expected], [*scales, *scales]))
        absolute, largest = torch.stack(norms).view(2, -1).tolist()
        relative = [found / norm if norm else found for found, norm in zip(absolute, largest, strict=True)]
        return dict(zip(gradients, relative, strict=True))

    def _difference(self, gradients: LayerGradients, expected: Tensor) -> Tensor:
        return gradients.combination(self._weights.flatten()).sub_(expected)

    def _rounding_of_passes(self, layers: Sequence[Layer]) -> dict[Layer, float]:
        """How far two ways of adding up backward passes may differ, relative to the norm of autograd's combination.

        In a deep network rounding of the output gradients exceeds that of the sums in which a layer ends. It is
        measured: by two backward passes whose combinations add up to the one that is checked. That every use is known
        shows within one backward pass, where both ways take the same output gradients.

        Returns:
            The relative difference that is rounding, of layers of which every use is known, and whose combination is
            more than rounding.
        """
        split = self._draw(tuple(self._weights.shape), Generator().manual_seed(_SPLIT_SEED))
        chunks = self._runs.each(compare_backward_passes, layers, self._weights, split.to(self._weights.device))
        differences = [
            torch.stack(of_layer).sum(0)
            for of_chunks in zip(*chunks, strict=True)
            for of_layer in zip(*of_chunks, strict=True)
        ]
        norms = torch.stack(torch._foreach_norm(differences)).view(-1, 2).tolist()
        scales = [self.norm([layer]) for layer in layers]
        own = [
            rounding / scale if 0.0 < scale < math.inf else math.inf
            for scale, (_, rounding) in zip(scales, norms, strict=True)
        ]
        usual = median(own)  # A layer of few parameters may agree by chance.
        return {
            layer: _PASSES * max(rounding, usual)
            for layer, scale, (missing, _), rounding in zip(layers, scales, norms, own, strict=True)
            if missing <= self._structured_rtol * scale and max(rounding, usual) <= _RESOLVED
        }

    def _confirm_by_terms(self, measured: MeasuredGradients) -> MeasuredGradients | None:
        """Accept gradients that differ by no more than the rounding of terms that cancel; ``None`` for others."""
        layer, structured, eps = measured.layer, measured.structured, torch.finfo(self._runs.network.dtype).eps
        difference = self._difference(measured.gradients, self._expected(layer)).abs().max()
        terms = torch.stack(self._runs.each(sum_term_magnitudes, layer, self._weights)).sum(0)
        largest, norm, moved = torch.stack([terms.max(), terms.norm(), difference]).tolist()
        rounding = _ROUNDING * eps * norm
        if self.norm([layer]) <= rounding or self._is_rounding(layer):
            return self._without_effect(layer, structured=structured)
        is_resolved = not structured or rounding <= _RESOLVED * self.norm([layer])
        return measured if is_resolved and moved <= _ROUNDING * eps * largest else None

    def _expected(self, layer: Layer) -> Tensor:
        """The combination by autograd, shape ``(N,)``."""
        gradients = [
            torch.zeros_like(self._runs.network.named_parameters[name]) if gradient is None else gradient
            for name in layer.parameters
            for gradient in [self._combined[name]]
        ]
        return torch.cat([as_result(gradient).flatten() for gradient in gradients])

    def _is_rounding(self, layer: Layer) -> bool:
        """Whether autograd's combination grows with the rounding unit of the evaluation.

        This finds what the magnitudes of the terms do not show: terms that cancel inside of a backward pass.
        """
        if self._in_other_precision is None:
            return False
        norms = [self.norm([layer]), _norm(_norms(self._in_other_precision), [layer])]
        high, low = norms if self._runs.network.dtype == torch.float64 else reversed(norms)
        return math.isfinite(low) and low >= _ONLY_ROUNDING * high

    @cached_property
    def _in_other_precision(self) -> dict[str, Tensor | None] | None:
        """The combination in float32 instead of float64, or the reverse; ``None`` where the module does not run so."""
        try:
            network, probe = in_other_precision(self._runs.network, self._runs.probe)
            return _combination(ProbeRuns(network, probe, chunk_size=self._runs.chunk_size), self._weights)
        except (TypeError, ValueError, RuntimeError):
            return None

    def _without_effect(self, layer: Layer, *, structured: bool) -> MeasuredGradients:
        note = (
            f"layer {escaped(layer.name)!r} has no effect: its gradients are the rounding of terms that cancel, and "
            f"count as zero"
        )
        return MeasuredGradients(layer, zero_gradients(layer, self.num_rows, self.device), structured, note)


def zero_gradients(layer: Layer, num_rows: int, device: torch.device) -> LayerGradients:
    """Return a matrix of zeros for a layer."""
    return StackedGradients((), (), num_rows=num_rows, num_columns=layer.num_parameters, device=device)


def disagreement(names: Sequence[str]) -> str:
    """Say that no method of computing the gradients of some layers reproduces those of autograd."""
    return (
        f"the gradients of layers {[*map(escaped, names)]} cannot be computed: two evaluations of them disagree. They "
        f"have lost their digits behind a saturated softmax: measure what enters it, by behavior=lambda module, "
        f"inputs: ...; a hook on a tensor that changes gradients, or a backward pass that draws random numbers, has "
        f"this effect too"
    )


def _combination(runs: ProbeRuns, weights: Tensor) -> dict[str, Tensor | None]:
    """The derivatives of a combination of all outputs, in float64; ``None`` where no output depends on a parameter."""
    names = [name for layer in runs.network.layers for name in layer.parameters]
    combined: dict[str, Tensor | None] = dict.fromkeys(names)
    for gradients in runs.each(_combination_of_chunk, weights):
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                total = combined[name]
                combined[name] = as_result(gradient) if total is None else total + as_result(gradient)
    return combined


def _combination_of_chunk(network: Network, chunk: Chunk, weights: Tensor) -> Sequence[Tensor | None]:
    outputs, parameters = network.rows(chunk.trace.outputs), network.parameters()
    if not outputs.requires_grad:
        return [None] * len(parameters)
    weights = weights[chunk.indices.to(weights.device)].to(outputs)
    return torch.autograd.grad(outputs, parameters, weights, retain_graph=True, allow_unused=True)


def _norms(combined: Mapping[str, Tensor | None]) -> dict[str, float]:
    """The norms of the derivatives by each parameter, read together."""
    gradients = {name: gradient for name, gradient in combined.items() if gradient is not None}
    norms = torch.stack(torch._foreach_norm([*gradients.values()])).tolist() if gradients else []
    return dict(zip(gradients, norms, strict=True))


def _norm(norms: Mapping[str, float], layers: Iterable[Layer]) -> float:
    return math.hypot(*(norms.get(name, 0.0) for layer in layers for name in layer.parameters))


def _refuse_infinite_gradients(runs: ProbeRuns) -> None:
    """Say on which inputs, and in which layers, gradients of finite outputs are not finite."""
    network, parameters = runs.network, runs.network.parameters()
    owners = [layer.name for layer in network.layers for _ in layer.parameters]
    layers: dict[str, None] = {}
    inputs: list[int] = []
    for index in range(runs.probe.size):
        try:  # Each input alone: one that is not finite spoils the gradients of a whole batch.
            row = network.rows(network.outputs(runs.probe.select([index])))
        except (TypeError, ValueError):  # Some modules cannot run a batch of one.
            row = network.rows(network.outputs(runs.probe))[index]
        gradients = torch.autograd.grad(row.sum(), parameters, allow_unused=True)
        is_bad = [gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients]
        layers |= {name: None for name, bad in zip(owners, is_bad, strict=True) if bad}
        inputs += [index] if any(is_bad) else []
    raise ValueError(
        f"gradients must be finite, but are NaN or infinite in the layers {list(layers)} on {len(inputs)} of the "
        f"{runs.probe.size} inputs, the first of them input {inputs[0] if inputs else 0}, although all outputs are "
        f"finite: keep sqrt, log, division and norm away from 0 also where torch.where or a mask does not take them "
        f"(by clamp, before), attention away from sets that are all padding, or leave these inputs out"
    )
