"""Operations that scale and shift, as uses of the parameters among their arguments."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from lightning_basin.operations.uses import ElementwiseUse, Leaving, ProductUse, Recording, Use


def _elementwise(
    recorder: Recording,
    leaving: Leaving,
    parameter: Any,
    num_axes: int,
    contributions: Callable[[Tensor], Tensor],
    *,
    axis: int | None = None,
    shifts: ProductUse | None = None,
) -> list[Use]:
    """A use whose parameter meets the last axes of the result, or one axis."""
    found = recorder.placed(parameter)
    if found is None or found[1].ndim > num_axes:
        return []
    source, positions = found
    if axis is not None:
        positions = positions.view(-1, *(1,) * (num_axes - axis - 1))
    positions = positions.view((1,) * (num_axes - positions.ndim) + tuple(positions.shape))
    return [ElementwiseUse(source, positions, leaving, contributions, shifts)]


def shift(
    recorder: Recording,
    leaving: Leaving,
    bias: Any,
    num_axes: int,
    products: Sequence[Use],
    *,
    axis: int | None = None,
) -> list[Use]:
    """Return the use of a bias that an operation adds to its product."""
    shifted = products[0] if len(products) == 1 else None
    assert not isinstance(shifted, ElementwiseUse)
    return _elementwise(recorder, leaving, bias, num_axes, lambda signal: signal, axis=axis, shifts=shifted)


def _fused_cell(
    recorder: Recording,
    _: Leaving,
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> list[Use]:
    """A step of a GRU or LSTM on an accelerator, which adds its biases to the products itself."""
    uses: list[Use] = []
    for gates, bias in ((input_gates, input_bias), (hidden_gates, hidden_bias)):
        if gates.grad_fn is not None:
            edge = get_gradient_edge(gates)
            products = [use for use in recorder.operations.uses if use.leaving.edge == edge]
            leaving = products[0].leaving if products else Leaving(gates.shape, edge)
            uses += shift(recorder, leaving, bias, 2, products)
    return uses


def _num_axes(*operands: Any) -> int:
    return max(operand.ndim for operand in operands if isinstance(operand, Tensor))


def _value(operand: Any, *, copy: bool = False) -> Any:
    """The number or the tensor that a parameter meets; a copy where the operation overwrites it."""
    if not isinstance(operand, Tensor):
        return operand
    return operand.detach().clone() if copy else operand.detach()


def _mul(recorder: Recording, leaving: Leaving, left: Any, right: Any, *, in_place: bool = False) -> list[Use]:
    for parameter, other in ((left, right), (right, left)):
        value = _value(other, copy=in_place)
        found = _elementwise(
            recorder,
            leaving,
            parameter,
            _num_axes(left, right),
            lambda signal, value=value: signal * value,  # type: ignore[misc]
        )
        if found:
            return found
    return []


def _add(recorder: Recording, leaving: Leaving, left: Any, right: Any, *, alpha: float = 1) -> list[Use]:
    axes = _num_axes(left, right)
    return _elementwise(recorder, leaving, left, axes, lambda signal: signal) or _elementwise(
        recorder, leaving, right, axes, lambda signal: signal * alpha
    )


def _sub(recorder: Recording, leaving: Leaving, left: Any, right: Any, *, alpha: float = 1) -> list[Use]:
    return _add(recorder, leaving, left, right, alpha=-alpha)


def _div(recorder: Recording, leaving: Leaving, left: Any, right: Any, *, in_place: bool = False) -> list[Use]:
    numerator, divisor = _value(left, copy=in_place), _value(right)
    axes = _num_axes(left, right)
    return _elementwise(recorder, leaving, left, axes, lambda signal: signal / divisor) or _elementwise(
        recorder, leaving, right, axes, lambda signal: -signal * numerator / divisor**2
    )


def _prelu(recorder: Recording, leaving: Leaving, entering: Tensor, weight: Tensor) -> list[Use]:
    negative = entering.detach().clamp(max=0)
    return _elementwise(recorder, leaving, weight, entering.ndim, lambda signal: signal * negative)


def _layer_norm(
    recorder: Recording,
    leaving: Leaving,
    entering: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> list[Use]:
    entering = entering.detach()

    def scaled(signal: Tensor) -> Tensor:
        return signal * F.layer_norm(entering, tuple(shape), eps=eps)

    return [
        *_elementwise(recorder, leaving, weight, entering.ndim, scaled),
        *_elementwise(recorder, leaving, bias, entering.ndim, lambda signal: signal),
    ]


def _rms_norm(
    recorder: Recording,
    leaving: Leaving,
    entering: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
) -> list[Use]:
    entering = entering.detach()
    return _elementwise(
        recorder, leaving, weight, entering.ndim, lambda signal: signal * F.rms_norm(entering, tuple(shape), eps=eps)
    )


def _batch_norm(
    recorder: Recording,
    leaving: Leaving,
    entering: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,  # noqa: FBT001  # as torch calls it
    momentum: float,
    eps: float,
) -> list[Use]:
    entering = entering.detach()
    mean, variance = (None if statistic is None else statistic.detach().clone() for statistic in (mean, variance))

    def scaled(signal: Tensor) -> Tensor:
        return signal * F.batch_norm(entering, mean, variance, training=training, momentum=0.0, eps=eps)

    return _channelwise(recorder, leaving, entering.ndim, weight, bias, scaled)


def _group_norm(
    recorder: Recording,
    leaving: Leaving,
    entering: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_inputs: int,
    num_channels: int,
    num_places: int,
    groups: int,
    eps: float,
) -> list[Use]:
    entering = entering.detach()

    def scaled(signal: Tensor) -> Tensor:
        return signal * F.group_norm(entering, groups, eps=eps)

    return _channelwise(recorder, leaving, entering.ndim, weight, bias, scaled)


def _channelwise(
    recorder: Recording,
    leaving: Leaving,
    num_axes: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scaled: Callable[[Tensor], Tensor],
) -> list[Use]:
    return [
        *_elementwise(recorder, leaving, weight, num_axes, scaled, axis=1),
        *_elementwise(recorder, leaving, bias, num_axes, lambda signal: signal, axis=1),
    ]


def _in_place(handler: Callable[..., list[Use]]) -> Callable[..., list[Use]]:
    return lambda *args, **kwargs: handler(*args, in_place=True, **kwargs)
