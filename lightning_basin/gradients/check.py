"""One random combination of all rows of the gradients, which each method of finding them must reproduce."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gradients import LayerGradients, StackedGradients
from lightning_basin.gradients.terms import sum_term_magnitudes
from lightning_basin.naming import escaped
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import agreement_rtol, in_other_precision
from lightning_basin.network.runs import Chunk, ProbeRuns

_ROUNDING = 4
"""Rounding units by which a sum may be off, relative to the sum of the magnitudes of its terms."""

_RESOLVED = 1e-3
"""Largest share of a combination that its rounding may be, where a structured gradient is still believed."""

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

    Args:
        runs: The network's runs over the probe.
        generator: A generator on the CPU; it draws the combination's weights, which are standard normal.

    Raises:
        ValueError: If the gradients are not finite.
    """

    def __init__(self, runs: ProbeRuns, generator: Generator) -> None:
        outputs = runs.network.rows(runs.full_trace.outputs)
        sizes = [chunk.probe.size for chunk in runs.chunks()]
        drawn = [torch.randn(size, outputs.shape[1], generator=generator, dtype=torch.float64) for size in sizes]
        self._runs = runs
        self._weights = torch.cat(drawn).to(outputs.device)
        self._combined = _combination(runs, self._weights)
        if not all(bool(gradient.isfinite().all()) for gradient in self._combined.values() if gradient is not None):
            _refuse_infinite_gradients(runs)

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
        return _norm(self._combined, layers)

    def is_unused(self, layer: Layer) -> bool:
        """Whether no output depends on the layer."""
        return all(self._combined[name] is None for name in layer.parameters)

    def confirm(
        self, layer: Layer, gradients: LayerGradients, *, structured: bool, note: str | None = None
    ) -> MeasuredGradients | None:
        """Accept gradients whose random combination is that of autograd; return ``None`` for others.

        The combinations may differ by rounding on the scale of the layer, on which its rank is decided. Where terms
        cancel, they may differ by the rounding of the terms. Where autograd's combination is no more than rounding, the
        layer has no effect, and zero gradients.

        Args:
            layer: The layer.
            gradients: The gradients to check.
            structured: Whether they come from the operations that use the layer. Then only rounding is allowed for, so
                that no use is missed, however weak.
            note: The record's note on them.
        """
        expected, eps = self._expected(layer), torch.finfo(self._runs.network.dtype).eps
        difference = (gradients.combination(self._weights.flatten()) - expected).abs().max()
        rtol = _ROUNDING * eps * self.num_rows**0.5 if structured else agreement_rtol(self._runs.network.dtype)
        is_confirmed = bool(difference <= rtol * expected.abs().max())
        if not is_confirmed:
            terms = torch.stack(self._runs.each(sum_term_magnitudes, layer, self._weights)).sum(0)
            rounding = _ROUNDING * eps * terms.norm()
            if bool(expected.norm() <= rounding) or self._is_rounding(layer):
                return self._without_effect(layer, structured=structured)
            is_resolved = not structured or bool(rounding <= _RESOLVED * expected.norm())
            is_confirmed = is_resolved and bool(difference <= _ROUNDING * eps * terms.max())
        return MeasuredGradients(layer, gradients, structured, note) if is_confirmed else None

    def _expected(self, layer: Layer) -> Tensor:
        """The combination by autograd, shape ``(N,)``."""
        gradients = [
            torch.zeros_like(self._runs.network.named_parameters[name]) if gradient is None else gradient
            for name in layer.parameters
            for gradient in [self._combined[name]]
        ]
        return torch.cat([gradient.to(torch.float64).flatten() for gradient in gradients])

    def _is_rounding(self, layer: Layer) -> bool:
        """Whether autograd's combination grows with the rounding unit of the evaluation.

        This finds what the magnitudes of the terms do not show: terms that cancel inside of a backward pass.
        """
        if self._in_other_precision is None:
            return False
        norms = [self.norm([layer]), _norm(self._in_other_precision, [layer])]
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
    """The derivatives of a combination of all outputs, in float64; ``None`` where no output depends on a parameter.

    Args:
        runs: The network's runs over the probe.
        weights: The weights of the outputs, shape ``(k, c)``.

    Returns:
        The derivatives by the full names of the parameters.
    """
    names = [name for layer in runs.network.layers for name in layer.parameters]
    combined: dict[str, Tensor | None] = dict.fromkeys(names)
    for gradients in runs.each(_combination_of_chunk, weights):
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                total = combined[name]
                combined[name] = gradient.to(torch.float64) if total is None else total + gradient
    return combined


def _combination_of_chunk(network: Network, chunk: Chunk, weights: Tensor) -> Sequence[Tensor | None]:
    outputs, parameters = network.rows(chunk.trace.outputs), network.parameters()
    if not outputs.requires_grad:
        return [None] * len(parameters)
    weights = weights[chunk.indices.to(weights.device)].to(outputs)
    return torch.autograd.grad(outputs, parameters, weights, retain_graph=True, allow_unused=True)


def _norm(combined: Mapping[str, Tensor | None], layers: Iterable[Layer]) -> float:
    gradients = [combined[name] for layer in layers for name in layer.parameters]
    norms = [gradient.norm() for gradient in gradients if gradient is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _refuse_infinite_gradients(runs: ProbeRuns) -> None:
    """Say on which inputs, and in which layers, gradients of finite outputs are not finite.

    Raises:
        ValueError: Always.
    """
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
