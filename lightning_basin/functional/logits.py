"""Losses as functions of logits, in which a cross-entropy is convex, where a network outputs probabilities.

A negative log-likelihood is linear in log-probabilities, and a binary cross-entropy of probabilities is almost flat
where the probabilities are near 1: the second derivative by the outputs then says nothing of how the loss curves. Both
are softmax cross-entropies of logits as well, and the values of the outputs show of which logits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_basin.functional.output_curvature import (
    LossOfOutputs,
    OutputCurvature,
    check_second_derivative,
    is_quadratic,
    output_curvature,
)

_SUM_ATOL = 1e-9  # error with which probabilities sum to one at any weights; rounding is near 1e-15
_LEAST_REMAINDER = 1e-10  # least 1 - p of which float64 holds six digits
_LEAST_PROBABILITY = 1e-300  # least p whose logarithm is a logit

LinkName = Literal["log_softmax", "softmax", "sigmoid"]
OutputsElsewhere = Callable[[], Sequence[Tensor]]
"""Returns outputs of the network at other, moderate weights; none where it cannot be run there."""


@dataclass(frozen=True, eq=False)
class Link:
    """The function that made outputs of logits.

    Attributes:
        name: The function. The outputs of ``log_softmax`` are logits themselves: it changes nothing a second time.
        groups: The outputs of one input that the function takes together, by their number in the flattened outputs:
            shapes ``(g, s)``, with s = 1 for ``sigmoid``. All other outputs stay as they are.
    """

    name: LinkName
    groups: tuple[Tensor, ...]

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the outputs of logits, both of shape ``(k, c)``."""
        unlinked = (~self._is_linked(logits)).nonzero().squeeze(1)
        order, parts = [unlinked], [logits[:, unlinked]]
        for members in self.groups:
            group = logits[:, members]
            group = group.sigmoid() if self.name == "sigmoid" else getattr(group, self.name)(-1)
            order.append(members.flatten())
            parts.append(group.flatten(1))
        return torch.cat(parts, 1)[:, torch.cat(order).argsort()]

    def logits(self, outputs: Tensor) -> Tensor:
        """Return logits that give the outputs, both of shape ``(k, c)``."""
        if self.name == "log_softmax":
            return outputs
        is_linked = self._is_linked(outputs)
        shares = torch.where(is_linked, outputs, 0.5)
        logits = shares.log() if self.name == "softmax" else shares.log() - (-shares).log1p()
        return torch.where(is_linked, logits, outputs)

    def slope(self, outputs: Tensor) -> Tensor | None:
        """Return the derivative of each logit by its output, shape ``(k, c)``; ``None`` for 1."""
        if self.name == "log_softmax":
            return None
        steepness = outputs if self.name == "softmax" else outputs * (1 - outputs)
        return torch.where(self._is_linked(outputs), 1 / steepness, 1.0)

    def is_lost(self, outputs: Tensor) -> Tensor:
        """Return which outputs have logits that have lost their digits, shape ``(k, c)``."""
        lost = (outputs < _LEAST_PROBABILITY) | (1 - outputs < _LEAST_REMAINDER)
        return lost & self._is_linked(outputs) & (self.name != "log_softmax")

    def _is_linked(self, outputs: Tensor) -> Tensor:
        is_linked = torch.zeros(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        for members in self.groups:
            is_linked[members.flatten()] = True
        return is_linked


@dataclass(frozen=True, eq=False)
class CanonicalLoss:
    """A loss as a function of its canonical outputs: the outputs themselves, or the logits that made them.

    Attributes:
        loss_fn: The loss, from canonical outputs in the shape of the outputs to a scalar.
        curvature: The curvature of the loss with respect to the canonical outputs.
        link: The function that made the outputs of the canonical ones; ``None`` where they are the same.
        slope: The derivative of the canonical outputs by the outputs, shape ``(k, c)``; ``None`` for 1.
    """

    loss_fn: LossOfOutputs
    curvature: OutputCurvature
    link: Link | None = None
    slope: Tensor | None = None

    def canonical_outputs(self, outputs: Tensor) -> Tensor:
        """Return the canonical outputs of outputs, both of shape ``(k, ...)``."""
        return outputs if self.link is None else self.link.logits(_flat(outputs)).view(outputs.shape)

    def blocks_of_outputs(self, blocks: Tensor) -> Tensor:
        """Return blocks for `weighted_rows` of the outputs, from blocks for rows of the canonical outputs."""
        return blocks if self.slope is None else blocks * self.slope.reshape(len(blocks), 1, -1)

    def gradients(self, gradients: Tensor) -> Tensor:
        """Return gradients of the canonical outputs, from gradients of the outputs, both of shape ``(m, N)``."""
        return gradients if self.slope is None else gradients * self.slope.reshape(-1, 1)


def canonical_loss(loss_fn: LossOfOutputs, outputs: Tensor, outputs_elsewhere: OutputsElsewhere) -> CanonicalLoss:
    """Differentiate a loss twice by the outputs, or by the logits where it is a cross-entropy of probabilities.

    Outputs that sum to one at other weights as well are probabilities. A RuntimeError refuses a loss that cannot be
    differentiated twice, whose derivatives are not finite or wrong, or whose logits are lost.
    """
    outputs = outputs.detach()
    plain = CanonicalLoss(loss_fn, output_curvature(loss_fn, outputs))
    links = _possible_links(loss_fn, plain.curvature, outputs, outputs_elsewhere)
    loss = next(filter(None, (_loss_of_logits(link, loss_fn, outputs) for link in links)), plain)
    check_second_derivative(loss.loss_fn, loss.canonical_outputs(outputs), loss.curvature)
    return loss


def _flat(outputs: Tensor) -> Tensor:
    """Outputs of shape ``(k, c)``, from ``(k, ...)``."""
    return outputs.reshape(outputs.shape[0], -1)


def _possible_links(
    loss_fn: LossOfOutputs, plain: OutputCurvature, outputs: Tensor, outputs_elsewhere: OutputsElsewhere
) -> Iterator[Link]:
    flat = _flat(outputs)
    is_curved = plain.matrices.any(-1).view(flat.shape).any(0)
    is_pulled = plain.slope.any(0)
    if bool((is_pulled & ~is_curved & (flat <= _SUM_ATOL).all(0)).any()) and (
        groups := _groups_that_sum_to_one(outputs, outputs_elsewhere, torch.exp)
    ):
        yield Link("log_softmax", tuple(groups))
    is_share = ((flat >= 0) & (flat <= 1)).all(0) & (is_curved | is_pulled)
    if plain.closed is not None:
        is_share &= ~plain.closed.view(-1, flat.shape[1]).all(0)
    scale = plain.identity_scale
    if not bool(is_share.any()) or (scale is not None and is_quadratic(loss_fn, outputs, scale)):
        return
    if groups := _groups_that_sum_to_one(outputs, outputs_elsewhere, torch.clone):
        yield Link("softmax", tuple(groups))
    yield Link("sigmoid", (is_share.nonzero(),))


def _loss_of_logits(link: Link, loss_fn: LossOfOutputs, outputs: Tensor) -> CanonicalLoss | None:
    """The loss as a function of the logits of the groups in which it is a cross-entropy; ``None`` if there is none."""
    flat = _flat(outputs)
    is_lost = link.is_lost(flat)
    # Lost logits do not matter to what the loss is.
    logits = link.logits(torch.where(is_lost, 0.5, flat)).view(outputs.shape)

    def loss_of_logits(values: Tensor) -> Tensor:
        return loss_fn(link.outputs(_flat(values)).view(values.shape))

    try:
        curvature = output_curvature(loss_of_logits, logits)
    except (RuntimeError, ValueError, TypeError):
        return None
    if curvature.closed is None:
        return None
    closed = curvature.closed.view(-1, flat.shape[1]).all(0)
    groups = [members[closed[members].all(-1)] for members in link.groups]
    if any(len(kept) < len(members) for kept, members in zip(groups, link.groups, strict=True)):
        remaining = tuple(kept for kept in groups if len(kept))
        return _loss_of_logits(Link(link.name, remaining), loss_fn, outputs) if remaining else None
    if bool(is_lost.any()):
        raise RuntimeError(
            "the loss is a cross-entropy of probabilities that have rounded to 0 or 1, and tell nothing more of their "
            "logits: return the logits, and take a loss of these, such as BCEWithLogitsLoss or CrossEntropyLoss"
        )
    return CanonicalLoss(loss_of_logits, curvature, link, link.slope(flat))


def _groups_that_sum_to_one(
    outputs: Tensor, outputs_elsewhere: OutputsElsewhere, probabilities: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Stretches along an axis whose probabilities sum to one for all inputs, at all weights; shapes ``(g, s)``."""
    for axis in range(1, outputs.ndim):
        rows = _rows_along(axis, probabilities(outputs))
        if not _spans(rows):
            continue
        others = [_rows_along(axis, probabilities(moved)) for moved in outputs_elsewhere()]
        if not others:
            return []
        # A sum of one by saturation does not last at other weights.
        spans = _spans(torch.cat([*others, rows]), is_unique=True)
        numbers = torch.arange(outputs[0].numel(), device=outputs.device).view(1, *outputs.shape[1:])
        if spans:
            return [_rows_along(axis, numbers)[:, first:last] for first, last in spans]
    return []


def _rows_along(axis: int, tensor: Tensor) -> Tensor:
    """The tensor with its rows along one axis, shape ``(n, s)``."""
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


def _spans(rows: Tensor, *, is_unique: bool = False) -> list[tuple[int, int]]:
    """First and last (exclusive) column of each stretch that sums to one in every row."""
    sums = torch.cat([torch.zeros_like(rows[:, :1]), rows.cumsum(1)], 1)
    if not bool(sums.isfinite().all()) or bool((rows < 0).any()):
        return []
    spans, start = [], 0
    while start < rows.shape[1] - 1:
        reach = sums[0, start] + sums.new_tensor([1 - _SUM_ATOL, 1 + _SUM_ATOL])
        first, last = torch.searchsorted(sums[0].contiguous(), reach, right=False).tolist()
        gaps = (sums[:, first : last + 1] - sums[:, start : start + 1] - 1).abs().amax(0)
        ends = (first + (gaps <= _SUM_ATOL).nonzero().flatten()).tolist()
        ends = [end for end in ends if end >= start + 1]
        if is_unique and len(ends) > 1:
            return []
        if ends and ends[-1] > start + 1:
            spans.append((start, ends[-1]))
        start = ends[-1] if ends else start + 1
    return spans
