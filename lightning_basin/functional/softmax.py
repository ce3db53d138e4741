"""Closed forms for losses of a softmax, which keep all digits where it saturates."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_basin.functional.rank import EPSILON

ROUNDING_RTOL = 1e-13  # times n: what eigenvalues of an n x n block with unit diagonal do not resolve
FORMULA_RTOL = 1e-12  # to which autograd's derivatives of a softmax follow the formula, by the scale of the loss
PROBABILITY_RTOL = 1e-2  # and at most those of a binary cross-entropy of probabilities, where one of these is small
SCALE_RTOL = 1e-9  # to which this scale and the labels are found at outputs where no input is saturated
NUM_SAMPLES = 2  # outputs at which a softmax must be found: any function of a difference looks like one at a single one


class OutputDerivatives(NamedTuple):
    """Of a loss at some outputs; n is 1 where the loss couples the inputs, with all outputs in a row, else k.

    Attributes:
        outputs: Shape ``(n, c)``.
        slope: First derivatives, shape ``(n, c)``.
        matrices: Second derivatives, shape ``(n, c, c)``.
    """

    outputs: Tensor
    slope: Tensor
    matrices: Tensor

    def of_groups(self, members: Tensor) -> "OutputDerivatives":
        """Those of g groups of s outputs, in turn for every input: shapes ``(n, g, s)`` and ``(n, g, s, s)``."""
        blocks = self.matrices[:, members.unsqueeze(2), members.unsqueeze(1)]
        return OutputDerivatives(self.outputs[:, members], self.slope[:, members], blocks)


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupFactors:
    """Square roots of the curvature of g groups of s outputs.

    Attributes:
        members: Which outputs these are, shape ``(g, s)``.
        roots: Shape ``(n, g, s, s)``; ``None`` where one group is not convex.
        slope: Where it is known better than by autograd, shape ``(n, g, s)``.
        slope_rounding: Its absolute error, beside what is relative to the entries.
        factor_rounding: That of the roots.
    """

    members: Tensor
    roots: Tensor | None
    slope: Tensor | None = None
    slope_rounding: float = 0.0
    factor_rounding: float = 0.0


def factors_of_groups(found: OutputDerivatives, samples: Sequence[OutputDerivatives]) -> Iterator[GroupFactors]:
    """Yield square roots of the curvature of each group of outputs: closed forms where these are a softmax."""
    for members in groups_of([found, *samples]):
        scales = softmax_scales(found.of_groups(members), [sample.of_groups(members) for sample in samples])
        closed = scales.isfinite().all(0)
        if bool(closed.any()):
            yield softmax_factors(found, samples[0], members[closed], scales[:, closed])
        if not bool(closed.all()):
            yield _factors_by_eigenvalues(found, members[~closed])


def _is_isotropic(matrices: Tensor) -> bool:
    """Whether all are the same multiple of the identity, and not zero, as of squared errors."""
    multiple = matrices[0, 0, 0]
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    return bool(multiple) and bool((matrices == multiple * identity).all())


def groups_of(found: Sequence[OutputDerivatives]) -> Iterator[Tensor]:
    """Outputs that are coupled, directly or by others: for each size s of a group the members, shape ``(g, s)``."""
    coupled = torch.stack([(derivatives.matrices != 0).any(0) for derivatives in found]).any(0)
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


def _with_alternative(logits: Tensor) -> Tensor:
    """The logits of a softmax; beside one on its own stands that of its alternative, which is 0."""
    return torch.cat([logits, torch.zeros_like(logits)], -1) if logits.shape[-1] == 1 else logits


def softmax_scales(found: OutputDerivatives, samples: Sequence[OutputDerivatives]) -> Tensor:
    """By what the curvature of a softmax is multiplied in each group, shape ``(n, g)``; NaN where it is none."""
    num_inputs, num_groups, size = found.outputs.shape
    unknown = found.outputs.new_full((num_inputs, num_groups), math.nan)
    if len(samples) < NUM_SAMPLES:
        return unknown
    fitted = [_fitted_softmax_scales(sample) for sample in samples]
    scales, targets = fitted[0], _scaled_targets(samples[0], fitted[0])
    # A softmax of one class, or of none that counts, is a constant. An output that is never curved is no logit.
    agree = (scales >= 0) & (scales.any(0) if size == 1 else True)
    for sample, again in zip(samples, fitted, strict=True):
        agree &= (again - scales).abs() <= SCALE_RTOL * scales
        agree &= _softmax_error(sample, again) <= _formula_rtol(sample) * again
        # The slope is s (p - t) at all outputs, with the same targets t.
        agree &= (_scaled_targets(sample, again) - targets).abs().amax(-1) <= SCALE_RTOL * scales
    agree &= _softmax_error(found, scales) <= _formula_rtol(found) * scales
    if size == 1:
        agree &= (_scaled_targets(found, scales) - targets).abs().amax(-1) <= SCALE_RTOL * scales
    return torch.where(agree, scales, unknown)


def _formula_rtol(found: OutputDerivatives) -> Tensor | float:
    """To which second derivatives must follow the formula, shape ``(n, g)``."""
    if found.outputs.shape[-1] > 1:
        return FORMULA_RTOL
    # That of torch's binary cross-entropy of probabilities is off by 2e-12 / p (1 - p). The slope is compared as well.
    spread = found.outputs.sigmoid() * (-found.outputs).sigmoid()
    return (FORMULA_RTOL * (1 + 4 / spread)).clamp_(max=PROBABILITY_RTOL).squeeze(-1)


def _fitted_softmax_scales(sample: OutputDerivatives) -> Tensor:
    # The second most likely class has p of at most 1/2: p (1 - p) suffers no cancellation there.
    entry, second = (best[..., 1:2] for best in _with_alternative(sample.outputs).softmax(-1).topk(2))
    second = second.clamp(max=sample.outputs.shape[-1] - 1)  # Of two classes both have the same curvature.
    curvatures = sample.matrices.diagonal(dim1=-2, dim2=-1).gather(-1, second)
    return (curvatures / (entry * (1 - entry))).squeeze(-1)


def _scaled_targets(found: OutputDerivatives, scales: Tensor) -> Tensor:
    probabilities = _with_alternative(found.outputs).softmax(-1)[..., : found.outputs.shape[-1]]
    return scales.unsqueeze(-1) * probabilities - found.slope


def _softmax_error(found: OutputDerivatives, scales: Tensor) -> Tensor:
    probabilities = _with_alternative(found.outputs).softmax(-1)
    softmax = torch.diag_embed(probabilities) - probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)
    size = found.outputs.shape[-1]
    return (found.matrices - scales[..., None, None] * softmax[..., :size, :size]).abs().amax((-2, -1))


def softmax_factors(
    found: OutputDerivatives, sample: OutputDerivatives, members: Tensor, scales: Tensor
) -> GroupFactors:
    """In closed form.

    Args:
        found: At the outputs.
        sample: Where nothing is saturated, which shows the labels.
        members: Of groups whose curvature is that of a softmax.
        scales: By what it is multiplied, shape ``(n, g)``.
    """
    size = members.shape[1]
    centring = _centring(_with_alternative(found.outputs[:, members]).softmax(-1))
    probabilities = _with_alternative(found.outputs[:, members]).softmax(-1)[..., :size]
    remaining = centring.diagonal(dim1=-2, dim2=-1)[..., :size]  # 1 - p with all digits.
    slope, targets = found.slope[:, members], _scaled_targets(sample.of_groups(members), scales)
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


def _factors_by_eigenvalues(found: OutputDerivatives, members: Tensor) -> GroupFactors:
    blocks = found.of_groups(members).matrices
    roots = _square_roots(blocks.flatten(0, 1))
    if roots is None or members.shape[1] == 1:  # A single square root is exact.
        return GroupFactors(members=members, roots=None if roots is None else roots.view_as(blocks))
    largest = float(torch.linalg.matrix_norm(roots, 2).max())
    return GroupFactors(members=members, roots=roots.view_as(blocks), factor_rounding=EPSILON * largest)


def _square_roots(blocks: Tensor) -> Tensor | None:
    """Of symmetric matrices, shape ``(n, s, s)``; ``None`` where one is not positive semidefinite."""
    # Scaled to a unit diagonal first (Demmel and Veselic, 1992): eigenvalues of very different size stay accurate.
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    if bool((diagonal < 0).any()):
        return None
    if blocks.shape[1] == 1:
        return blocks.sqrt()
    # What stands beside a zero on the diagonal is compared with the largest entry.
    scales = torch.where(diagonal > 0, diagonal, blocks.abs().amax((1, 2)).unsqueeze(1)).sqrt()
    inverses = torch.where(scales > 0, 1 / scales, 1.0)
    eigenvalues, eigenvectors = torch.linalg.eigh(inverses.unsqueeze(2) * blocks * inverses.unsqueeze(1))
    if bool((eigenvalues < -ROUNDING_RTOL * blocks.shape[1]).any()):
        return None
    kept = torch.where(eigenvalues > ROUNDING_RTOL * blocks.shape[1], eigenvalues, 0.0)
    roots: Tensor = kept.sqrt().unsqueeze(2) * eigenvectors.mT * scales.unsqueeze(1)
    return roots


def softmax_jacobian(outputs: Tensor) -> Tensor:
    """Derivative of the softmax over the second axis with respect to the outputs, as blocks for `weighted_rows`.

    Args:
        outputs: Shape ``(k, classes, ...)``.

    Returns:
        Of the flattened outputs of each input, shape ``(k, c, c)``.

    Example:
        >>> softmax_jacobian(torch.zeros(1, 2, dtype=torch.float64))
        tensor([[[ 0.2500, -0.2500],
                 [-0.2500,  0.2500]]], dtype=torch.float64)
    """
    values, classes = outputs.detach().flatten(1), outputs.shape[1]
    # Flat index of each class at each position of one input.
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
