"""The loss of a network at its outputs: its derivatives there, and whether they bracket the Hessian's nullity."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_basin.functional.bracket import NullSpace
from lightning_basin.functional.hessian import is_connected
from lightning_basin.functional.logits import CanonicalLoss, canonical_loss
from lightning_basin.functional.output_curvature import LossOfOutputs, OutputCurvature
from lightning_basin.functional.rank import EPSILON
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.network.runs import ProbeRuns

_LEAST_SCALE = 1e-60  # least derivative of a loss that is not scaled
_OTHER_WEIGHTS = (0.3, 0.03)  # factors of the weights at which outputs are not saturated


@dataclass(frozen=True, eq=False)
class LossCurvature:
    """A loss of a network at its outputs on the probe.

    Attributes:
        loss_fn: The loss divided by ``scale``, from outputs to a scalar.
        outputs: The outputs, without their graph, shape ``(k, ...)``.
        scale: A power of two that brings the squares of the loss's derivatives into the range of float64; else 1.
        canonical: The loss divided by ``scale``, as a function of the canonical outputs.
        has_penalty: Whether the loss depends on the network's parameters beside the outputs.
        behavior_is_outputs: Whether the behavior, whose gradients are measured, is the outputs themselves.
    """

    loss_fn: LossOfOutputs
    outputs: Tensor
    scale: float
    canonical: CanonicalLoss
    has_penalty: bool
    behavior_is_outputs: bool

    @cached_property
    def curvature(self) -> OutputCurvature:
        """The curvature at the canonical outputs."""
        curvature = self.canonical.curvature
        # Whatever the outputs do, a penalty is no part of P.
        return replace(curvature, residual_is_zero=False) if self.has_penalty else curvature

    @property
    def is_convex(self) -> bool:
        """Whether the loss is convex in the canonical outputs."""
        return self.curvature.factors is not None

    @property
    def is_provable(self) -> bool:
        """Whether the spectrum of P and bounds on R bracket the Hessian's nullity."""
        return self.is_convex and not self.has_penalty

    @property
    def is_exact(self) -> bool:
        """Whether H = P, because the slope is zero at every output."""
        return self.is_convex and self.curvature.residual_is_zero

    @cached_property
    def gradient_scale(self) -> float | None:
        """The number s where P is s GᵀG for the behavioral gradients G; ``None`` where it is not."""
        if not self.behavior_is_outputs or self.canonical.slope is not None:
            return None
        return self.curvature.identity_scale

    def rescaled(self, null_space: NullSpace) -> NullSpace:
        """Return the null space of the original loss, with its resolving loss, from that of the divided loss."""
        null_space = null_space.scaled(self.scale)
        return replace(null_space, resolving_loss=self._resolving_loss(null_space))

    def _resolving_loss(self, null_space: NullSpace) -> float | None:
        """The loss below which the two ends of a bracket meet; ``None`` where they do, or if it is not known.

        For a squared error R falls with the residual, and the loss with its square.
        """
        is_open = null_space.upper is not None and null_space.lower != null_space.upper
        smallest = null_space.smallest or 0.0
        if smallest <= null_space.rtol * (null_space.largest or 0.0):  # The tolerance keeps them apart.
            return None
        residual = null_space.residual_estimate or null_space.residual
        if not is_open or not residual or not self._is_squared_error:
            return None
        loss = self._value * (smallest / (2 * residual)) ** 2
        return loss * self.scale if loss > self._rounding else 0.0

    @cached_property
    def _value(self) -> float:
        return float(self.loss_fn(self.outputs).detach())

    @cached_property
    def _rounding(self) -> float:
        """The squared error that the rounding of the outputs leaves."""
        return 0.5 * (self.curvature.identity_scale or 0.0) * float((EPSILON * self.outputs).square().sum())

    @cached_property
    def _is_squared_error(self) -> bool:
        """Whether the loss is a multiple of the sum of squared residuals, which a perfect fit brings to zero."""
        scale = self.curvature.identity_scale
        if scale is None:
            return False
        half_square = 0.5 * float(self.curvature.slope.square().sum()) / scale
        return abs(self._value - half_square) <= agreement_rtol(self.outputs.dtype) * half_square


def loss_curvature(loss_fn: LossOfOutputs, runs: ProbeRuns, *, behavior_is_outputs: bool) -> LossCurvature:
    """Differentiate a loss at the outputs of a network, or refuse it with a RuntimeError."""
    network, outputs = runs.network, runs.full_trace.outputs.detach()

    def canonical(loss_fn: LossOfOutputs) -> CanonicalLoss:
        return canonical_loss(loss_fn, outputs, lambda: _outputs_elsewhere(runs))

    loss = canonical(loss_fn)
    scale = _scale_of(loss.curvature)
    if scale != 1:
        loss = canonical(_divided(loss_fn, scale))
    value = loss_fn(outputs)  # With a graph of parameters beside the outputs, and of those of the loss itself.
    return LossCurvature(
        loss_fn=_divided(loss_fn, scale),
        outputs=outputs,
        scale=scale,
        canonical=loss,
        has_penalty=value.requires_grad and any(is_connected(value, network.parameters())),
        behavior_is_outputs=behavior_is_outputs,
    )


def _divided(loss_fn: LossOfOutputs, scale: float) -> LossOfOutputs:
    return loss_fn if scale == 1 else lambda outputs: loss_fn(outputs) / scale


def _scale_of(curvature: OutputCurvature) -> float:
    """A power of two by which to divide a loss: 1, unless squares of its derivatives leave the range of float64."""
    largest = float(curvature.matrices.abs().max()) or float(curvature.slope.abs().max())
    if not largest or _LEAST_SCALE < largest < 1 / _LEAST_SCALE:
        return 1.0
    return 2.0 ** math.frexp(largest)[1]


def _outputs_elsewhere(runs: ProbeRuns) -> list[Tensor]:
    """Outputs of a network at weights smaller by different factors; none where it cannot be run there."""
    network, outputs = runs.network, []
    weights = network.parameters()
    for factor in _OTHER_WEIGHTS:
        with network.at([factor * weight for weight in weights]), torch.no_grad():
            try:
                outputs.append(network.outputs(runs.probe))
            except (TypeError, ValueError):
                return []
    return outputs
