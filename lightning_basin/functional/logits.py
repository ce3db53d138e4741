"""Outputs that are probabilities or their logarithms, seen as the logits in which a cross-entropy is convex.

A negative log-likelihood is linear in log-probabilities, and a binary cross-entropy of probabilities all but flat where
these are near 1: the second derivative by the outputs then says nothing of how the loss curves. As functions of the
weights the same losses are softmax cross-entropies of logits, and what the outputs are shows which.
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
    is_square,
    output_curvature,
)

_SUM_ATOL = 1e-9  # to which probabilities sum to one at any weights; rounding is near 1e-15
_LEAST_REMAINDER = 1e-10  # of 1 - p, of which float64 then holds six digits
_LEAST_PROBABILITY = 1e-300

LinkName = Literal["log_softmax", "softmax", "sigmoid"]


@dataclass(frozen=True, eq=False)
class Link:
    """What made outputs of logits.

    Attributes:
        name: The function; those of ``log_softmax`` are logits themselves, as it changes nothing a second time.
        groups: Outputs of one input that it takes together, by their number in the flattened outputs: shapes
            ``(g, s)``, with s = 1 for ``sigmoid``. All others stay as they are.
    """

    name: LinkName
    groups: tuple[Tensor, ...]

    def outputs(self, logits: Tensor) -> Tensor:
        """Of logits, both of shape ``(k, c)``."""
        chosen = self._chosen(logits)
        kept = (~chosen).nonzero().squeeze(1)
        order, parts = [kept], [logits[:, kept]]
        for members in self.groups:
            made = logits[:, members]
            made = made.sigmoid() if self.name == "sigmoid" else getattr(made, self.name)(-1)
            order.append(members.flatten())
            parts.append(made.flatten(1))
        return torch.cat(parts, 1)[:, torch.cat(order).argsort()]

    def logits(self, outputs: Tensor) -> Tensor:
        """That give the outputs, both of shape ``(k, c)``."""
        if self.name == "log_softmax":
            return outputs
        chosen = self._chosen(outputs)
        shares = torch.where(chosen, outputs, 0.5)
        found = shares.log() if self.name == "softmax" else shares.log() - (-shares).log1p()
        return torch.where(chosen, found, outputs)

    def slope(self, outputs: Tensor) -> Tensor | None:
        """Derivative of each logit by its output, shape ``(k, c)``; ``None`` for 1."""
        if self.name == "log_softmax":
            return None
        steepness = outputs if self.name == "softmax" else outputs * (1 - outputs)
        return torch.where(self._chosen(outputs), 1 / steepness, 1.0)

    def is_lost(self, outputs: Tensor) -> Tensor:
        """Of which outputs the logits have lost their digits, shape ``(k, c)``."""
        lost = (outputs < _LEAST_PROBABILITY) | (1 - outputs < _LEAST_REMAINDER)
        return lost & self._chosen(outputs) & (self.name != "log_softmax")

    def _chosen(self, outputs: Tensor) -> Tensor:
        chosen = torch.zeros(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        for members in self.groups:
            chosen[members.flatten()] = True
        return chosen


@dataclass(frozen=True, eq=False)
class SeenOutputs:
    """Outputs as a loss is seen to depend on them: as they are, or as logits.

    Attributes:
        loss_fn: From what is seen, in the shape of the outputs, to the loss.
        curvature: Of the loss, with respect to what is seen.
        link: What made the outputs of what is seen; ``None`` where these are the same.
        slope: Derivative of what is seen by the outputs, shape ``(k, c)``; ``None`` for 1.
    """

    loss_fn: LossOfOutputs
    curvature: OutputCurvature
    link: Link | None = None
    slope: Tensor | None = None

    def seen(self, outputs: Tensor) -> Tensor:
        """What is seen of outputs, shape ``(k, ...)``."""
        return outputs if self.link is None else self.link.logits(_flat(outputs)).view(outputs.shape)

    def of_outputs(self, blocks: Tensor) -> Tensor:
        """Blocks that combine rows of what is seen, as blocks for `weighted_rows` of the outputs."""
        return blocks if self.slope is None else blocks * self.slope.reshape(len(blocks), 1, -1)

    def rows(self, gradients: Tensor) -> Tensor:
        """Gradients of what is seen, from those of the outputs, both of shape ``(m, N)``."""
        return gradients if self.slope is None else gradients * self.slope.reshape(-1, 1)


def seen_outputs(loss_fn: LossOfOutputs, outputs: Tensor, elsewhere: Callable[[], Sequence[Tensor]]) -> SeenOutputs:
    """Differentiate a loss twice by the outputs, or by the logits where it is a cross-entropy of these only.

    Args:
        loss_fn: From outputs, in the shape of ``outputs``, to a scalar.
        outputs: Shape ``(k, ...)``.
        elsewhere: Outputs of the network at other, moderate weights: what sums to one there as well always does.

    Raises:
        RuntimeError: See `output_curvature` and `check_second_derivative`; if the loss is a cross-entropy of
            probabilities whose logits are lost.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
        >>> log_probabilities = [logits.log_softmax(1), (0.1 * logits).log_softmax(1)]
        >>> labels = torch.tensor([0, 1])
        >>> found = seen_outputs(
        ...     lambda f: torch.nn.functional.nll_loss(f, labels), log_probabilities[0], lambda: log_probabilities[1:]
        ... )
        >>> found.link.name, found.curvature.matrices[1]
        ('log_softmax', tensor([[ 0.1250, -0.1250],
                [-0.1250,  0.1250]], dtype=torch.float64))
    """
    outputs = outputs.detach()
    plain = SeenOutputs(loss_fn, output_curvature(loss_fn, outputs))
    links = _possible_links(loss_fn, plain.curvature, outputs, elsewhere)
    seen = next(filter(None, (_seen_through(link, loss_fn, outputs) for link in links)), plain)
    check_second_derivative(seen.loss_fn, seen.seen(outputs), seen.curvature)
    return seen


def _flat(outputs: Tensor) -> Tensor:
    """Shape ``(k, c)``, from ``(k, ...)``."""
    return outputs.reshape(outputs.shape[0], -1)


def _possible_links(
    loss_fn: LossOfOutputs, plain: OutputCurvature, outputs: Tensor, elsewhere: Callable[[], Sequence[Tensor]]
) -> Iterator[Link]:
    assert plain.slope is not None
    flat = _flat(outputs)
    curved = plain.matrices.any(-1).view(flat.shape).any(0)
    pulled = plain.slope.any(0)
    if bool((pulled & ~curved & (flat <= _SUM_ATOL).all(0)).any()):
        groups = _summing_to_one(outputs, elsewhere, torch.exp)
        yield from (Link("log_softmax", tuple(groups)) for _ in range(bool(groups)))
    is_share = ((flat >= 0) & (flat <= 1)).all(0) & (curved | pulled)
    if plain.closed is not None:
        is_share &= ~plain.closed.view(-1, flat.shape[1]).all(0)
    is_squared_error = plain.multiple is not None and is_square(loss_fn, outputs, plain.multiple)
    if is_squared_error or not bool(is_share.any()):
        return
    groups = _summing_to_one(outputs, elsewhere, torch.clone)
    yield from (Link("softmax", tuple(groups)) for _ in range(bool(groups)))
    yield Link("sigmoid", (is_share.nonzero(),))


def _seen_through(link: Link, loss_fn: LossOfOutputs, outputs: Tensor) -> SeenOutputs | None:
    """The loss as a function of the logits of those groups in which it is a cross-entropy; ``None`` where in none."""
    flat = _flat(outputs)
    lost = link.is_lost(flat)
    # Lost logits do not matter to what the loss is.
    logits = link.logits(torch.where(lost, 0.5, flat)).view(outputs.shape)

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
        return _seen_through(Link(link.name, remaining), loss_fn, outputs) if remaining else None
    if bool(lost.any()):
        raise RuntimeError(
            "the loss is a cross-entropy of probabilities that have rounded to 0 or 1, and tell nothing more of their "
            "logits: return the logits, and take a loss of these, such as BCEWithLogitsLoss or CrossEntropyLoss"
        )
    return SeenOutputs(loss_of_logits, curvature, link, link.slope(flat))


def _summing_to_one(
    outputs: Tensor, elsewhere: Callable[[], Sequence[Tensor]], share: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Stretches of outputs along one axis whose shares sum to one for all inputs and at all weights, as groups."""
    for axis in range(1, outputs.ndim):
        shares = _along(axis, share(outputs))
        if not _spans(shares):
            continue
        others = [_along(axis, share(found)) for found in elsewhere()]
        if not others:
            return []
        # What is saturated at these weights is not at the others.
        spans = _spans(torch.cat([*others, shares]), is_only=True)
        positions = _along(axis, torch.arange(outputs[0].numel(), device=outputs.device).view(1, *outputs.shape[1:]))
        if spans:
            return [positions[:, first:last] for first, last in spans]
    return []


def _along(axis: int, tensor: Tensor) -> Tensor:
    """With rows along one axis, shape ``(n, s)``."""
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


def _spans(shares: Tensor, *, is_only: bool = False) -> list[tuple[int, int]]:
    """First and last (exclusive) column of each stretch that sums to one in every row.

    Args:
        shares: Shape ``(n, c)``.
        is_only: Whether to find nothing where a stretch could end at different columns.
    """
    sums = torch.cat([torch.zeros_like(shares[:, :1]), shares.cumsum(1)], 1)
    if not bool(sums.isfinite().all()) or bool((shares < 0).any()):
        return []
    found, start = [], 0
    while start < shares.shape[1] - 1:
        reach = sums[0, start] + sums.new_tensor([1 - _SUM_ATOL, 1 + _SUM_ATOL])
        first, last = torch.searchsorted(sums[0].contiguous(), reach, right=False).tolist()
        gaps = (sums[:, first : last + 1] - sums[:, start : start + 1] - 1).abs().amax(0)
        ends = (first + (gaps <= _SUM_ATOL).nonzero().flatten()).tolist()
        ends = [end for end in ends if end >= start + 1]
        if is_only and len(ends) > 1:
            return []
        if ends and ends[-1] > start + 1:
            found.append((start, ends[-1]))
        start = ends[-1] if ends else start + 1
    return found
