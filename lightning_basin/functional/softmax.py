"""Closed forms for losses of a softmax, which keep all digits where it saturates."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_basin.functional.rank import EPSILON

FORMULA_RTOL = 1e-12
"""Error of autograd's derivatives of a softmax against the formula, relative to the scale of the loss."""

SCALE_RTOL = 1e-9
"""Error of the scale and the labels that are found at outputs where no input is saturated."""

NUM_SAMPLES = 2
"""Random outputs at which a softmax must be found: at a single one any function of a difference looks like one."""

_ROUNDING_RTOL = 1e-13  # n times this is the rounding of eigenvalues of an n x n block with unit diagonal
_PROBABILITY_RTOL = 1e-2  # largest error of a binary cross-entropy of probabilities, where a probability is small


class OutputDerivatives(NamedTuple):
    """Derivatives of a loss at some outputs.

    The number n of rows is k, or 1 where the loss couples the inputs, with all outputs in a row.

    Attributes:
        outputs: The outputs, shape ``(n, c)``.
        slope: The first derivatives, shape ``(n, c)``.
        matrices: The second derivatives, shape ``(n, c, c)``.
    """

    outputs: Tensor
    slope: Tensor
    matrices: Tensor

    def of_groups(self, members: Tensor) -> "OutputDerivatives":
        """Derivatives by g groups of s outputs: shapes ``(n, g, s)`` and ``(n, g, s, s)``."""
        blocks = self.matrices[:, members.unsqueeze(2), members.unsqueeze(1)]
        return OutputDerivatives(self.outputs[:, members], self.slope[:, members], blocks)


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupFactors:
    """Square roots of the curvature of g groups of s outputs.

    Attributes:
        members: The outputs of each group, shape ``(g, s)``.
        roots: The square roots, shape ``(n, g, s, s)``; ``None`` where one group is not convex.
        slope: The slope where it is known better than by autograd, shape ``(n, g, s)``.
        slope_rounding: The absolute error of the slope, beside what is relative to its entries.
        factor_rounding: The absolute error of the roots.
    """

    members: Tensor
    roots: Tensor | None
    slope: Tensor | None = None
    slope_rounding: float = 0.0
    factor_rounding: float = 0.0


def factors_of_groups(derivatives: OutputDerivatives, samples: Sequence[OutputDerivatives]) -> Iterator[GroupFactors]:
    """Yield square roots of the curvature of each group of outputs: closed forms where a group is a softmax."""
    for members in _coupled_groups([derivatives, *samples]):
        scales = _softmax_scales(derivatives.of_groups(members), [sample.of_groups(members) for sample in samples])
        is_softmax = scales.isfinite().all(0)
        if bool(is_softmax.any()):
            yield _softmax_factors(derivatives, samples[0], members[is_softmax], scales[:, is_softmax])
        if not bool(is_softmax.all()):
            yield _factors_by_eigenvalues(derivatives, members[~is_softmax])


def _coupled_groups(derivatives: Sequence[OutputDerivatives]) -> Iterator[Tensor]:
    """Yield groups of outputs that are coupled, directly or through others: for each size s the members, ``(g, s)``."""
    coupled = torch.stack([(each.matrices != 0).any(0) for each in derivatives]).any(0)
    lowest = torch.arange(len(coupled), device=coupled.device)
    while True:  # Each output takes over the lowest number in reach, and then what that one has taken over.
        reached = torch.where(coupled, lowest, len(coupled)).amin(1).minimum(lowest)
        reached = reached[reached]
        if torch.equal(reached, lowest):
            break
        lowest = reached
    order = lowest.argsort(stable=True)
    counts = torch.bincount(lowest)
    sizes = counts[counts > 0]
    starts = sizes.cumsum(0) - sizes
    for size in sorted(set(sizes.tolist())):
        yield order[starts[sizes == size].unsqueeze(1) + torch.arange(size, device=coupled.device)]


def _softmax_scales(derivatives: OutputDerivatives, samples: Sequence[OutputDerivatives]) -> Tensor:
    """Find by which number the curvature of a softmax is multiplied, ``(n, g)``; NaN where a group is no softmax."""
    num_rows, num_groups, size = derivatives.outputs.shape
    unknown = derivatives.outputs.new_full((num_rows, num_groups), math.nan)
    if len(samples) < NUM_SAMPLES:
        return unknown
    fitted = [_fitted_scales(sample) for sample in samples]
    scales, targets = fitted[0], _scaled_targets(samples[0], fitted[0])
    # A softmax of one class, or of none that counts, is a constant. An output that is never curved is no logit.
    agree = (scales >= 0) & (scales.any(0) if size == 1 else True)
    for sample, again in zip(samples, fitted, strict=True):
        agree &= (again - scales).abs() <= SCALE_RTOL * scales
        agree &= _formula_error(sample, again) <= _formula_rtol(sample) * again
        # The slope is s (p - t) at all outputs, with the same targets t.
        agree &= (_scaled_targets(sample, again) - targets).abs().amax(-1) <= SCALE_RTOL * scales
    agree &= _formula_error(derivatives, scales) <= _formula_rtol(derivatives) * scales
    if size == 1:
        agree &= (_scaled_targets(derivatives, scales) - targets).abs().amax(-1) <= SCALE_RTOL * scales
    return torch.where(agree, scales, unknown)


def _with_alternative(logits: Tensor) -> Tensor:
    """The logits of a softmax; a single logit gets the logit 0 of its alternative beside it."""
    return torch.cat([logits, torch.zeros_like(logits)], -1) if logits.shape[-1] == 1 else logits


def _formula_rtol(derivatives: OutputDerivatives) -> Tensor | float:
    """The tolerance on second derivatives against the formula, shape ``(n, g)``."""
    if derivatives.outputs.shape[-1] > 1:
        return FORMULA_RTOL
    # Torch's binary cross-entropy of probabilities is off by 2e-12 / p (1 - p). The slope is compared as well.
    variance = derivatives.outputs.sigmoid() * (-derivatives.outputs).sigmoid()
    return (FORMULA_RTOL * (1 + 4 / variance)).clamp_(max=_PROBABILITY_RTOL).squeeze(-1)


def _fitted_scales(sample: OutputDerivatives) -> Tensor:
    # The second most likely class has p of at most 1/2: p (1 - p) suffers no cancellation there.
    probability, second = (best[..., 1:2] for best in _with_alternative(sample.outputs).softmax(-1).topk(2))
    second = second.clamp(max=sample.outputs.shape[-1] - 1)  # Both of two classes have the same curvature.
    curvatures = sample.matrices.diagonal(dim1=-2, dim2=-1).gather(-1, second)
    return (curvatures / (probability * (1 - probability))).squeeze(-1)


def _scaled_targets(derivatives: OutputDerivatives, scales: Tensor) -> Tensor:
    """The targets t of a slope s (p - t), times s."""
    probabilities = _with_alternative(derivatives.outputs).softmax(-1)[..., : derivatives.outputs.shape[-1]]
    return scales.unsqueeze(-1) * probabilities - derivatives.slope


def _formula_error(derivatives: OutputDerivatives, scales: Tensor) -> Tensor:
    """The largest difference from s (diag(p) - p p^T) in each group, shape ``(n, g)``."""
    probabilities = _with_alternative(derivatives.outputs).softmax(-1)
    softmax = torch.diag_embed(probabilities) - probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)
    size = derivatives.outputs.shape[-1]
    return (derivatives.matrices - scales[..., None, None] * softmax[..., :size, :size]).abs().amax((-2, -1))


def _softmax_factors(
    derivatives: OutputDerivatives, sample: OutputDerivatives, members: Tensor, scales: Tensor
) -> GroupFactors:
    """Factor the curvature of softmaxes in closed form."""
    size = members.shape[1]
    probabilities = _with_alternative(derivatives.outputs[:, members]).softmax(-1)
    centring = _centring(probabilities)
    probabilities = probabilities[..., :size]
    remaining = centring.diagonal(dim1=-2, dim2=-1)[..., :size]  # 1 - p with all digits.
    slope, targets = derivatives.slope[:, members], _scaled_targets(sample.of_groups(members), scales)
    scales = scales.unsqueeze(-1)
    is_label = targets > 0.5 * scales
    exact = scales * torch.where(is_label, -remaining, probabilities)
    is_hard = (targets - scales * is_label).abs().amax(-1, keepdim=True) <= SCALE_RTOL * scales
    is_hard &= (exact - slope).abs().amax(-1, keepdim=True) <= FORMULA_RTOL * scales
    roots = (scales * probabilities).sqrt()
    return GroupFactors(
        members=members,
        roots=(roots * remaining.sqrt()).unsqueeze(-1) if size == 1 else roots.unsqueeze(-1) * centring,
        slope=torch.where(is_hard, exact, slope),
        slope_rounding=EPSILON * float(torch.where(is_hard, 0.0, scales).max()),
    )


def _factors_by_eigenvalues(derivatives: OutputDerivatives, members: Tensor) -> GroupFactors:
    blocks = derivatives.of_groups(members).matrices
    roots = _square_roots(blocks.flatten(0, 1))
    if roots is None or members.shape[1] == 1:  # A single square root is exact.
        return GroupFactors(members=members, roots=None if roots is None else roots.view_as(blocks))
    largest = float(torch.linalg.matrix_norm(roots, 2).max())
    return GroupFactors(members=members, roots=roots.view_as(blocks), factor_rounding=EPSILON * largest)


def _square_roots(blocks: Tensor) -> Tensor | None:
    """Square roots of symmetric matrices, shape ``(n, s, s)``; ``None`` where one is not positive semidefinite."""
    # Scaled to a unit diagonal first (Demmel and Veselic, 1992): eigenvalues of very different size stay accurate.
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    if bool((diagonal < 0).any()):
        return None
    if blocks.shape[1] == 1:
        return blocks.sqrt()
    # An entry beside a zero on the diagonal is compared with the largest entry.
    scales = torch.where(diagonal > 0, diagonal, blocks.abs().amax((1, 2)).unsqueeze(1)).sqrt()
    inverses = torch.where(scales > 0, 1 / scales, 1.0)
    eigenvalues, eigenvectors = torch.linalg.eigh(inverses.unsqueeze(2) * blocks * inverses.unsqueeze(1))
    if bool((eigenvalues < -_ROUNDING_RTOL * blocks.shape[1]).any()):
        return None
    positive = torch.where(eigenvalues > _ROUNDING_RTOL * blocks.shape[1], eigenvalues, 0.0)
    roots: Tensor = positive.sqrt().unsqueeze(2) * eigenvectors.mT * scales.unsqueeze(1)
    return roots


def softmax_jacobian(outputs: Tensor) -> Tensor:
    """Differentiate the softmax over the second axis by the outputs, as blocks for `weighted_rows`.

    Args:
        outputs: The outputs, shape ``(k, classes, ...)``.

    Returns:
        The derivative by the flattened outputs of each input, shape ``(k, c, c)``.

    Example:
        >>> softmax_jacobian(torch.zeros(1, 2, dtype=torch.float64))
        tensor([[[ 0.2500, -0.2500],
                 [-0.2500,  0.2500]]], dtype=torch.float64)
    """
    values, classes = outputs.detach().flatten(1), outputs.shape[1]
    # The flat index of each class at each position of one input.
    order = torch.arange(values.shape[1], device=values.device).view(classes, -1).mT
    probabilities = values[:, order].softmax(-1)
    jacobian = values.new_zeros(values.shape[0], values.shape[1], values.shape[1])
    jacobian[:, order.unsqueeze(2), order.unsqueeze(1)] = probabilities.unsqueeze(-1) * _centring(probabilities)
    return jacobian


def _centring(probabilities: Tensor) -> Tensor:
    """I - 1 p^T of each row of probabilities, shape ``(..., classes, classes)``."""
    classes = probabilities.shape[-1]
    others = probabilities.unsqueeze(-2).expand(*probabilities.shape[:-1], classes, classes).clone()
    others.diagonal(dim1=-2, dim2=-1).zero_()
    # 1 - p as the sum of the others: every row then annihilates constants to full relative precision.
    return torch.diag_embed(others.sum(-1)) - others
