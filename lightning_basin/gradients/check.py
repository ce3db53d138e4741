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
        self._norms = _norms(self._combined)
        # A norm may be infinite although all elements are finite.
        if not math.isfinite(sum(self._norms.values())) and not _are_finite(self._combined):
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
        return _norm(self._norms, layers)

    def is_unused(self, layer: Layer) -> bool:
        """Whether no output depends on the layer."""
        return all(self._combined[name] is None for name in layer.parameters)

    def confirm(
        self, gradients: Mapping[Layer, LayerGradients], *, structured: bool, notes: Mapping[Layer, str | None]
    ) -> dict[Layer, MeasuredGradients]:
        """Accept gradients whose random combination is that of autograd.

        The combinations may differ by rounding on the scale of the layer, on which its rank is decided. Where terms
        cancel, they may differ by the rounding of the terms. Where autograd's combination is no more than rounding, the
        layer has no effect, and zero gradients.

        Args:
            gradients: The gradients to check, of layers that are held together.
            structured: Whether they come from the operations that use the layers. Then only rounding is allowed for, so
                that no use is missed, however weak.
            notes: The record's notes on them; layers without one have no entry.

        Returns:
            The gradients that are confirmed, by layer.
        """
        eps, confirmed = torch.finfo(self._runs.network.dtype).eps, {}
        rtol = _ROUNDING * eps * self.num_rows**0.5 if structured else agreement_rtol(self._runs.network.dtype)
        for layer, (difference, largest) in self._differences(gradients).items():
            measured = MeasuredGradients(layer, gradients[layer], structured, notes.get(layer))
            if difference <= rtol * largest:
                confirmed[layer] = measured
            elif (replaced := self._confirm_by_terms(measured, difference)) is not None:
                confirmed[layer] = replaced
        return confirmed

    def _differences(self, gradients: Mapping[Layer, LayerGradients]) -> dict[Layer, tuple[float, float]]:
        """The largest difference from autograd's combination, and the largest element of that one, of each layer.

        All are read together, as a device waits at each transfer.
        """
        if not gradients:
            return {}
        weights = self._weights.flatten()
        expected = [self._expected(layer) for layer in gradients]
        differences = [
            found.combination(weights).sub_(target) for found, target in zip(gradients.values(), expected, strict=True)
        ]
        largest = torch.stack(torch._foreach_norm([*differences, *expected], math.inf)).tolist()
        return dict(zip(gradients, zip(largest, largest[len(expected) :], strict=False), strict=True))

    def _confirm_by_terms(self, measured: MeasuredGradients, difference: float) -> MeasuredGradients | None:
        """Accept gradients that differ by no more than the rounding of terms that cancel; ``None`` for others."""
        layer, structured, eps = measured.layer, measured.structured, torch.finfo(self._runs.network.dtype).eps
        terms = torch.stack(self._runs.each(sum_term_magnitudes, layer, self._weights)).sum(0)
        largest, norm = torch.stack([terms.max(), terms.norm()]).tolist()
        rounding = _ROUNDING * eps * norm
        if self.norm([layer]) <= rounding or self._is_rounding(layer):
            return self._without_effect(layer, structured=structured)
        is_resolved = not structured or rounding <= _RESOLVED * self.norm([layer])
        return measured if is_resolved and difference <= _ROUNDING * eps * largest else None

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


def _norms(combined: Mapping[str, Tensor | None]) -> dict[str, float]:
    """The norms of the derivatives by each parameter, read together."""
    gradients = {name: gradient for name, gradient in combined.items() if gradient is not None}
    norms = torch.stack(torch._foreach_norm([*gradients.values()])).tolist() if gradients else []
    return dict(zip(gradients, norms, strict=True))


def _norm(norms: Mapping[str, float], layers: Iterable[Layer]) -> float:
    return math.hypot(*(norms.get(name, 0.0) for layer in layers for name in layer.parameters))


def _are_finite(combined: Mapping[str, Tensor | None]) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in combined.values() if gradient is not None)


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
