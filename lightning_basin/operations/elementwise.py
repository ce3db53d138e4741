"""Operations that scale and shift, as uses of the parameters among their arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from lightning_basin.operations.uses import Call, Handler, OperationOutput, ProductUse, Use, aten


def _fused_cell(
    call: Call,
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
            products = [use for use in call.earlier if isinstance(use, ProductUse) and use.output.edge == edge]
            output = products[0].output if products else OperationOutput(gates.shape, edge)
            uses += replace(call, output=output).bias(bias, 2, products)
    return uses


def _num_axes(*operands: Any) -> int:
    return max(operand.ndim for operand in operands if isinstance(operand, Tensor))


def _value(operand: Any, *, copy: bool = False) -> Any:
    """The number or the tensor that a parameter meets; a copy where the operation overwrites it."""
    if not isinstance(operand, Tensor):
        return operand
    return operand.detach().clone() if copy else operand.detach()


def _beside(derivative: Tensor, operand: Any) -> Any:
    """A number, or a tensor on the device and in the type of a derivative, which may be others than the network's."""
    # In two steps: torch converts on the device that a tensor comes from.
    return operand.to(derivative.device).to(derivative.dtype) if isinstance(operand, Tensor) else operand


def _mul(call: Call, left: Any, right: Any, *, in_place: bool = False) -> Sequence[Use]:
    axes, first, second = _num_axes(left, right), _value(left, copy=in_place), _value(right, copy=in_place)
    return call.elementwise(
        left, axes, lambda derivative: derivative * _beside(derivative, second)
    ) or call.elementwise(right, axes, lambda derivative: derivative * _beside(derivative, first))


def _add(call: Call, left: Any, right: Any, *, alpha: float = 1) -> Sequence[Use]:
    axes = _num_axes(left, right)
    return call.elementwise(left, axes, lambda derivative: derivative) or call.elementwise(
        right, axes, lambda derivative: derivative * alpha
    )


def _sub(call: Call, left: Any, right: Any, *, alpha: float = 1) -> Sequence[Use]:
    return _add(call, left, right, alpha=-alpha)


def _div(call: Call, left: Any, right: Any, *, in_place: bool = False) -> Sequence[Use]:
    axes, numerator, divisor = _num_axes(left, right), _value(left, copy=in_place), _value(right)
    return call.elementwise(
        left, axes, lambda derivative: derivative / _beside(derivative, divisor)
    ) or call.elementwise(
        right, axes, lambda derivative: -derivative * _beside(derivative, numerator) / _beside(derivative, divisor) ** 2
    )


def _prelu(call: Call, inputs: Tensor, weight: Tensor) -> Sequence[Use]:
    negative = inputs.detach().clamp(max=0)
    return call.elementwise(weight, inputs.ndim, lambda derivative: derivative * _beside(derivative, negative))


def _layer_norm(
    call: Call, inputs: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Sequence[Use]:
    inputs = inputs.detach()
    return _scale_and_shift(call, inputs.ndim, weight, bias, lambda: F.layer_norm(inputs, tuple(shape), eps=eps))


def _rms_norm(
    call: Call, inputs: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> Sequence[Use]:
    inputs = inputs.detach()
    return _scale_and_shift(call, inputs.ndim, weight, None, lambda: F.rms_norm(inputs, tuple(shape), eps=eps))


def _batch_norm(
    call: Call,
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,  # noqa: FBT001  # as torch calls it
    momentum: float,
    eps: float,
) -> Sequence[Use]:
    inputs = inputs.detach()
    mean, variance = (None if statistic is None else statistic.detach().clone() for statistic in (mean, variance))

    def normalized() -> Tensor:
        return F.batch_norm(inputs, mean, variance, training=training, momentum=0.0, eps=eps)

    return _scale_and_shift(call, inputs.ndim, weight, bias, normalized, axis=1)


def _group_norm(
    call: Call,
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_inputs: int,
    num_channels: int,
    num_places: int,
    groups: int,
    eps: float,
) -> Sequence[Use]:
    inputs = inputs.detach()
    return _scale_and_shift(call, inputs.ndim, weight, bias, lambda: F.group_norm(inputs, groups, eps=eps), axis=1)


def _scale_and_shift(
    call: Call,
    num_axes: int,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[], Tensor],
    *,
    axis: int | None = None,
) -> Sequence[Use]:
    """The uses of a normalization, whose weight scales what ``normalized`` returns."""
    return [
        *call.elementwise(
            weight, num_axes, lambda derivative: derivative * _beside(derivative, normalized()), axis=axis
        ),
        *call.elementwise(bias, num_axes, lambda derivative: derivative, axis=axis),
    ]


HANDLERS: Mapping[Any, Handler] = {
    aten.mul.Tensor: _mul,
    aten.mul_.Tensor: partial(_mul, in_place=True),
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.sub_.Tensor: _sub,
    aten.div.Tensor: _div,
    aten.div_.Tensor: partial(_div, in_place=True),
    aten._prelu_kernel.default: _prelu,
    aten._thnn_fused_gru_cell.default: _fused_cell,
    aten._thnn_fused_lstm_cell.default: _fused_cell,
    aten.native_layer_norm.default: _layer_norm,
    aten._fused_rms_norm.default: _rms_norm,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_group_norm.default: _group_norm,
}
"""The function that finds the uses, by operation."""
