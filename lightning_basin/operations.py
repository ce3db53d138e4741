"""Which operations use which parameter, recorded while a network runs.

A parameter reaches the outputs only through the operations that take it, whatever the module is called that holds it:
a linear layer, attention and a recurrent cell all multiply a matrix with what enters. So the gradients of an input
follow from what entered each operation and the derivatives of the outputs by what left it, without one gradient with
respect to a parameter. Two forms are enough: a `ProductUse` multiplies and sums (matrix products, convolutions,
look-ups), an `ElementwiseUse` scales, shifts or copies (normalisations, biases, positional embeddings, class tokens).

What is not known here is not recorded. Whether the recorded uses are all of them is for the caller to check.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_basin.probe import tensors_of

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Source:
    """What operations use: a parameter, or a tensor that was computed from parameters and constants alone.

    Attributes:
        name: Of the parameter; ``None`` for a tensor computed from some.
        tensor: Attached to the graph.
    """

    name: str | None
    tensor: Tensor


@dataclass(eq=False)
class Leaving:
    """What left one operation, as a place in the graph: the tensor itself may be overwritten later.

    Attributes:
        shape: Of the tensor.
        edge: ``None`` where no parameter can be reached from it.
    """

    shape: torch.Size = torch.Size()  # noqa: RUF009  # immutable
    edge: GradientEdge | None = None


@dataclass(frozen=True, eq=False)
class ProductUse:
    """An operation whose result is a sum of products of a parameter with what enters.

    Attributes:
        source: The parameter.
        positions: Which of its entries stand in the matrix that multiplies, shape ``(d_out, d_in)``.
        leaving: The result of the operation.
        activations: Returns what is multiplied, shape ``(n, t, d_in)``; the n rows belong to the k inputs.
        signals: From a derivative by the result to that by what leaves, shape ``(n, t, d_out)``.
        num_activations: Entries of what ``activations`` returns.
    """

    source: Source
    positions: Tensor
    leaving: Leaving
    activations: Callable[[], Tensor]
    signals: Callable[[Tensor], Tensor]
    num_activations: int


@dataclass(frozen=True, eq=False)
class ElementwiseUse:
    """An operation that scales, shifts or copies, repeating its parameter along some axes of the result.

    Attributes:
        source: The parameter.
        positions: Which of its entries are used, with one axis for each of the result, of length 1 where repeated.
        leaving: The result of the operation.
        contributions: From a derivative by the result to that by the repeated parameter, with the same axes.
        shifts: The product to which this is added, as a bias is.
    """

    source: Source
    positions: Tensor
    leaving: Leaving
    contributions: Callable[[Tensor], Tensor]
    shifts: ProductUse | None = None


Use = ProductUse | ElementwiseUse


@dataclass(eq=False)
class Operations:
    """What was recorded.

    Attributes:
        uses: In the order of the forward pass.
        num_elements: Numbers in all results that depend on a parameter: the size of the graph.
    """

    uses: list[Use] = field(default_factory=list)
    num_elements: int = 0


@contextmanager
def recorded_operations(
    parameters: Mapping[str, Tensor], constants: Sequence[Tensor], *, num_inputs: int
) -> Iterator[Operations]:
    """Record the operations that use parameters while the body runs.

    Args:
        parameters: By name.
        constants: Tensors that depend on no input, such as buffers.
        num_inputs: k; a tensor that is made or repeated to this length has a part for each input.
    """
    recorder = _Recorder(parameters, constants, num_inputs)
    with recorder:
        yield recorder.operations
    recorder.settle()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch 2.13 leaves its base untyped
    """Sees every operation below autograd."""

    def __init__(self, parameters: Mapping[str, Tensor], constants: Sequence[Tensor], num_inputs: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = Operations()
        self._num_inputs = num_inputs
        self._sources = {id(tensor): Source(name, tensor) for name, tensor in parameters.items()}
        # Tensors that depend on no input. Kept alive, or another tensor could get the same id.
        self._fixed = {id(tensor): tensor for tensor in (*parameters.values(), *constants)}
        # Copies of parameters for each input: views of what is fixed, yet not fixed themselves.
        self._parts: dict[int, Tensor] = {}
        self._orders: dict[int, Tensor] = {}
        self._unsettled: list[tuple[Leaving, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.settle()
        kwargs = kwargs or {}
        arguments = tensors_of((args, kwargs))
        is_fixed = all(map(self._is_fixed, arguments))
        leaving = Leaving()
        # Before the operation runs: it may overwrite what enters it.
        if is_fixed:
            uses = self._copies(func, args, leaving)
        else:
            uses = _HANDLERS[func](self, leaving, *args, **kwargs) if func in _HANDLERS else []
        if not is_fixed and func._schema.is_mutable:
            self._forget_written(func, args, kwargs)
        results = func(*args, **kwargs)
        tensors = tensors_of(results)
        if uses and not tensors[0].is_complex():  # Derivatives by complex numbers follow other rules.
            self.operations.uses += uses
            self._unsettled.append((leaving, tensors[0]))
        is_copied = is_fixed and (bool(uses) or self._are_repeated_indices(func, args))
        if is_copied or any(id(tensor) in self._parts for tensor in arguments):
            shared = {tensor.untyped_storage().data_ptr() for tensor in arguments}
            self._parts |= {id(tensor): tensor for tensor in tensors if tensor.untyped_storage().data_ptr() in shared}
        elif is_fixed and not self._has_part_for_each_input(arguments, tensors):
            self._fixed |= {id(tensor): tensor for tensor in tensors}
        if not is_fixed and any(tensor.requires_grad for tensor in arguments):
            self.operations.num_elements += sum(tensor.numel() for tensor in tensors)
        return results

    def settle(self) -> None:
        """Note where in the graph the last results are: only after an operation has returned are they in it."""
        for leaving, tensor in self._unsettled:
            leaving.shape = tensor.shape
            if (
                tensor.grad_fn is not None
            ):  # A view of a parameter, taken without a graph, requires gradients and has none.
                leaving.edge = get_gradient_edge(tensor)
        self._unsettled.clear()

    def placed(self, tensor: Any) -> tuple[Source, Tensor] | None:
        """The source that a tensor is (a view of), with the entries that it shows; ``None`` for what has none."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or id(tensor) in self._parts:
            return None
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if id(base) not in self._fixed or base.dtype != tensor.dtype:
            return None
        source = self._sources.setdefault(id(base), Source(None, base))
        # One for all uses: a recurrent cell uses its weights at every step.
        order = self._orders.get(id(base))
        if order is None:
            order = self._orders[id(base)] = _order(base)
        return source, order.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - base.storage_offset())

    def _is_fixed(self, tensor: Tensor) -> bool:
        if id(tensor) in self._parts:
            return False
        return id(tensor) in self._fixed or (tensor._is_view() and id(tensor._base) in self._fixed)

    def _forget_written(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """What depends on an input is written into a tensor: neither it nor a view of it is fixed any more."""
        written: set[int] = set()
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written |= {
                    tensor.untyped_storage().data_ptr() for tensor in tensors_of(value) if self._is_fixed(tensor)
                }
        if written:
            self._fixed = {
                key: tensor for key, tensor in self._fixed.items() if tensor.untyped_storage().data_ptr() not in written
            }

    def _copies(self, func: Any, args: tuple[Any, ...], leaving: Leaving) -> list[Use]:
        """A use, where a parameter is copied for each input."""
        if func not in (_aten.expand.default, _aten.repeat.default) or self._num_inputs == 1:
            return []
        tensor, sizes = args[0], args[1]
        old = (1,) * (len(sizes) - tensor.ndim) + tuple(tensor.shape)
        copies = [
            size if func is _aten.repeat.default or (length == 1 and size > 0) else 1
            for size, length in zip(sizes, old, strict=True)
        ]
        found = self.placed(tensor)
        if found is None or not any(count % self._num_inputs == 0 for count in copies if count > 1):
            return []
        source, positions = found
        interleaved = tuple(length for pair in zip(copies, old, strict=True) for length in pair)
        ones = tuple(length for size in old for length in (1, size))
        return [ElementwiseUse(source, positions.view(ones), leaving, lambda signal: signal.reshape(interleaved))]

    def _are_repeated_indices(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether integers are repeated for each input, as the places of tokens that look up their embeddings are."""
        if func not in (_aten.expand.default, _aten.repeat.default) or self._num_inputs == 1 or not args[1]:
            return False
        tensor, sizes = args
        is_repeated = sizes[0] == self._num_inputs and (tensor.ndim < len(sizes) or tensor.shape[0] == 1)
        return is_repeated and not tensor.is_floating_point()

    def _has_part_for_each_input(self, arguments: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
        """Whether a new tensor was made in the number of the inputs, as the first state of a recurrent network is."""
        return not arguments and any(
            tensor.is_floating_point() and self._num_inputs in tensor.shape for tensor in results
        )


def _order(base: Tensor) -> Tensor:
    """Which entries of a tensor, counted in its logical order, stand where in its storage."""
    order = torch.arange(base.numel(), device=base.device).view(base.shape)
    if base.is_contiguous():
        return order
    extent = 1 + sum((size - 1) * stride for size, stride in zip(base.shape, base.stride(), strict=True))
    stored = order.new_zeros(extent)
    stored.as_strided(base.shape, base.stride()).copy_(order)
    return stored


# Products. Every handler takes the operation's arguments and returns the uses of parameters among them.


def _mm(recorder: _Recorder, leaving: Leaving, left: Tensor, right: Tensor) -> list[Use]:
    return _product(
        recorder, leaving, left, right, operand=lambda tensor: tensor.detach(), result=lambda signal: signal
    )


def _product(
    recorder: _Recorder,
    leaving: Leaving,
    left: Tensor,
    right: Tensor,
    *,
    operand: Callable[[Tensor], Tensor],
    result: Callable[[Tensor], Tensor],
    index: int | None = None,
) -> list[Use]:
    """The product of two matrices, one of them a parameter; ``operand`` and ``result`` select it from a batch."""
    for parameter, other, is_right in ((right, left, True), (left, right, False)):
        found = recorder.placed(parameter)
        if found is None:
            continue
        source, positions = found
        positions = positions if index is None else positions[index]
        entering = operand(other)

        if is_right:
            return [
                ProductUse(
                    source,
                    positions.mT,
                    leaving,
                    lambda entering=entering: entering.unsqueeze(1),  # type: ignore[misc]
                    lambda signal: result(signal).unsqueeze(1),
                    entering.numel(),
                )
            ]
        return [
            ProductUse(
                source,
                positions,
                leaving,
                lambda entering=entering: entering.mT.unsqueeze(1),  # type: ignore[misc]
                lambda signal: result(signal).mT.unsqueeze(1),
                entering.numel(),
            )
        ]
    return []


def _bmm(recorder: _Recorder, leaving: Leaving, left: Tensor, right: Tensor) -> list[Use]:
    uses = []
    for index in range(left.shape[0]):
        uses += _product(
            recorder,
            leaving,
            left,
            right,
            operand=lambda tensor, index=index: tensor[index].detach(),  # type: ignore[misc]
            result=lambda signal, index=index: signal[index],  # type: ignore[misc]
            index=index,
        )
    return uses


def _addmm(
    recorder: _Recorder,
    leaving: Leaving,
    bias: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> list[Use]:
    if beta != 1 or alpha != 1:
        return []
    products = _mm(recorder, leaving, left, right)
    return [*products, *_shift(recorder, leaving, bias, 2, products)]


def _mv(recorder: _Recorder, leaving: Leaving, matrix: Tensor, vector: Tensor) -> list[Use]:
    found = recorder.placed(vector)
    if found is None:
        return []
    source, positions = found
    entering = matrix.detach()
    return [
        ProductUse(
            source,
            positions.unsqueeze(0),
            leaving,
            lambda: entering.unsqueeze(1),
            lambda signal: signal.view(-1, 1, 1),
            entering.numel(),
        )
    ]


def _trilinear(
    recorder: _Recorder, leaving: Leaving, first: Tensor, weight: Tensor, second: Tensor, *layout: Sequence[int]
) -> list[Use]:
    found = recorder.placed(weight)
    if found is None or tuple(map(tuple, layout)) != ((1, 3), (0,), (1, 2), (2, 3)):  # As F.bilinear calls it.
        return []
    source, positions = found
    first, second = first.detach(), second.detach()
    return [
        ProductUse(
            source,
            positions.flatten(1),
            leaving,
            lambda: (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1).unsqueeze(1),
            lambda signal: signal.unsqueeze(1),
            first.numel() * second.shape[1],
        )
    ]


def _convolution(
    recorder: _Recorder,
    leaving: Leaving,
    entering: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,  # noqa: FBT001  # as torch calls it
    output_padding: Sequence[int],
    groups: int,
) -> list[Use]:
    dimensions = weight.ndim - 2
    stride, padding, dilation = (tuple(sizes) * (dimensions // len(sizes)) for sizes in (stride, padding, dilation))
    kernel = _Kernel(tuple(weight.shape[2:]), stride, dilation, padding)
    products: list[Use] = []
    found = recorder.placed(weight)
    if found is not None:
        source, positions = found
        entering = entering.detach()
        for group in range(groups):
            chosen = positions.chunk(groups)[group].flatten(1)
            if transposed:
                products.append(_transposed_group(source, chosen.mT, leaving, entering, kernel, group, groups))
            else:
                products.append(_group(source, chosen, leaving, entering, kernel, group, groups))
    return [*products, *_shift(recorder, leaving, bias, 2 + dimensions, products, axis=1)]


@dataclass(frozen=True)
class _Kernel:
    """The geometry of a convolution, each along all its dimensions."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    def patches(self, tensor: Tensor) -> Tensor:
        """What the kernel sees at each of its places, shape ``(n, *places, channels * size)``."""
        tensor = F.pad(tensor, [pad for padding in reversed(self.padding) for pad in (padding, padding)])
        sizes = zip(self.size, self.stride, self.dilation, strict=True)
        for axis, (size, stride, dilation) in enumerate(sizes, start=2):
            tensor = tensor.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        dimensions = len(self.size)
        return tensor.movedim(1, 1 + dimensions).flatten(1 + dimensions)

    def num_places(self, spatial: Sequence[int]) -> int:
        """At how many places the kernel fits."""
        count = 1
        for length, size, stride, dilation, padding in zip(
            spatial, self.size, self.stride, self.dilation, self.padding, strict=True
        ):
            count *= (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
        return count


def _group(
    source: Source, positions: Tensor, leaving: Leaving, entering: Tensor, kernel: _Kernel, group: int, groups: int
) -> ProductUse:
    channels = entering.chunk(groups, 1)[group]
    num_places = kernel.num_places(entering.shape[2:])
    return ProductUse(
        source,
        positions,
        leaving,
        lambda: kernel.patches(channels).flatten(1, -2),
        lambda signal: signal.chunk(groups, 1)[group].flatten(2).mT,
        channels.shape[0] * num_places * positions.shape[1],
    )


def _transposed_group(
    source: Source, positions: Tensor, leaving: Leaving, entering: Tensor, kernel: _Kernel, group: int, groups: int
) -> ProductUse:
    """A transposed convolution writes a patch for each place of what enters: the two sides change roles."""
    channels = entering.chunk(groups, 1)[group]

    def signals(signal: Tensor) -> Tensor:
        seen = kernel.patches(signal.chunk(groups, 1)[group])
        for axis, length in enumerate(entering.shape[2:], start=1):  # No place sees what output_padding adds.
            seen = seen.narrow(axis, 0, length)
        return seen.flatten(1, -2)

    return ProductUse(source, positions, leaving, lambda: channels.flatten(2).mT, signals, channels.numel())


# Look-ups multiply with one-hot activations. Only the rows of the table that occur can have gradients.


def _embedding(
    recorder: _Recorder,
    leaving: Leaving,
    table: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002  # as torch calls it
    sparse: bool = False,  # noqa: FBT001, FBT002
) -> list[Use]:
    flat = indices.flatten()
    weights = (flat != padding_idx).to(table.dtype)
    return _lookup(
        recorder, leaving, table, flat, torch.arange(flat.numel(), device=flat.device), weights, flat.numel()
    )


def _embedding_bag(
    recorder: _Recorder,
    leaving: Leaving,
    table: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002  # as torch calls it
    mode: int = 0,
    sparse: bool = False,  # noqa: FBT001, FBT002
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,  # noqa: FBT001, FBT002
    padding_idx: int = -1,
) -> list[Use]:
    modes = {"sum": 0, "mean": 1}
    if mode not in modes.values():  # The largest entry of a bag is no sum of products.
        return []
    num_bags = offsets.numel() - int(include_last_offset)
    places = torch.arange(indices.numel(), device=indices.device)
    bags = torch.searchsorted(offsets[:num_bags].contiguous(), places, right=True) - 1
    weights = (indices != padding_idx).to(table.dtype)
    if mode == modes["mean"]:
        counts = weights.new_zeros(num_bags).index_add_(0, bags, weights)
        weights = weights / counts[bags].clamp(min=1)
    if per_sample_weights is not None:
        weights = weights * per_sample_weights.detach()
    return _lookup(recorder, leaving, table, indices, bags, weights, num_bags)


def _index(recorder: _Recorder, leaving: Leaving, table: Tensor, indices: Sequence[Tensor | None]) -> list[Use]:
    first = indices[0]
    if len(indices) != 1 or first is None or first.dtype != torch.int64:
        return []
    flat = first.flatten() % table.shape[0]
    places = torch.arange(flat.numel(), device=flat.device)
    return _lookup(recorder, leaving, table, flat, places, flat.new_ones(flat.shape, dtype=table.dtype), flat.numel())


def _index_select(recorder: _Recorder, leaving: Leaving, table: Tensor, axis: int, indices: Tensor) -> list[Use]:
    return _index(recorder, leaving, table, [indices]) if axis == 0 else []


def _lookup(
    recorder: _Recorder,
    leaving: Leaving,
    table: Tensor,
    indices: Tensor,
    rows: Tensor,
    weights: Tensor,
    num_rows: int,
) -> list[Use]:
    """Row ``rows[i]`` of the result is (a sum of) ``weights[i]`` times row ``indices[i]`` of the table."""
    found = recorder.placed(table)
    if found is None:
        return []
    source, positions = found
    used, places = torch.unique(indices, return_inverse=True)

    def activations() -> Tensor:
        counted = weights.new_zeros(num_rows, used.numel())
        return counted.index_put_((rows, places), weights, accumulate=True).unsqueeze(1)

    return [
        ProductUse(
            source,
            positions.flatten(1)[used].mT,
            leaving,
            activations,
            lambda signal: signal.reshape(num_rows, 1, -1),
            num_rows * used.numel(),
        )
    ]


# Scaling and shifting.


def _elementwise(
    recorder: _Recorder,
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


def _shift(
    recorder: _Recorder,
    leaving: Leaving,
    bias: Any,
    num_axes: int,
    products: Sequence[Use],
    *,
    axis: int | None = None,
) -> list[Use]:
    shifted = products[0] if len(products) == 1 else None
    assert not isinstance(shifted, ElementwiseUse)
    return _elementwise(recorder, leaving, bias, num_axes, lambda signal: signal, axis=axis, shifts=shifted)


def _fused_cell(
    recorder: _Recorder,
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
            uses += _shift(recorder, leaving, bias, 2, products)
    return uses


def _num_axes(*operands: Any) -> int:
    return max(operand.ndim for operand in operands if isinstance(operand, Tensor))


def _value(operand: Any, *, copy: bool = False) -> Any:
    """The number or the tensor that a parameter meets; a copy where the operation overwrites it."""
    if not isinstance(operand, Tensor):
        return operand
    return operand.detach().clone() if copy else operand.detach()


def _mul(recorder: _Recorder, leaving: Leaving, left: Any, right: Any, *, in_place: bool = False) -> list[Use]:
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


def _add(recorder: _Recorder, leaving: Leaving, left: Any, right: Any, *, alpha: float = 1) -> list[Use]:
    axes = _num_axes(left, right)
    return _elementwise(recorder, leaving, left, axes, lambda signal: signal) or _elementwise(
        recorder, leaving, right, axes, lambda signal: signal * alpha
    )


def _sub(recorder: _Recorder, leaving: Leaving, left: Any, right: Any, *, alpha: float = 1) -> list[Use]:
    return _add(recorder, leaving, left, right, alpha=-alpha)


def _div(recorder: _Recorder, leaving: Leaving, left: Any, right: Any, *, in_place: bool = False) -> list[Use]:
    numerator, divisor = _value(left, copy=in_place), _value(right)
    axes = _num_axes(left, right)
    return _elementwise(recorder, leaving, left, axes, lambda signal: signal / divisor) or _elementwise(
        recorder, leaving, right, axes, lambda signal: -signal * numerator / divisor**2
    )


def _prelu(recorder: _Recorder, leaving: Leaving, entering: Tensor, weight: Tensor) -> list[Use]:
    negative = entering.detach().clamp(max=0)
    return _elementwise(recorder, leaving, weight, entering.ndim, lambda signal: signal * negative)


def _layer_norm(
    recorder: _Recorder,
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
    recorder: _Recorder,
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
    recorder: _Recorder,
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
    recorder: _Recorder,
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
    recorder: _Recorder,
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


_HANDLERS: Mapping[Any, Callable[..., list[Use]]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten.mv.default: _mv,
    _aten._trilinear.default: _trilinear,
    _aten.convolution.default: _convolution,
    _aten.embedding.default: _embedding,
    _aten._embedding_bag.default: _embedding_bag,
    _aten.index.Tensor: _index,
    _aten.index_select.default: _index_select,
    _aten.mul.Tensor: _mul,
    _aten.mul_.Tensor: _in_place(_mul),
    _aten.add.Tensor: _add,
    _aten.add_.Tensor: _add,
    _aten.sub.Tensor: _sub,
    _aten.sub_.Tensor: _sub,
    _aten.div.Tensor: _div,
    _aten.div_.Tensor: _in_place(_div),
    _aten._prelu_kernel.default: _prelu,
    _aten._thnn_fused_gru_cell.default: _fused_cell,
    _aten._thnn_fused_lstm_cell.default: _fused_cell,
    _aten.native_layer_norm.default: _layer_norm,
    _aten._fused_rms_norm.default: _rms_norm,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_group_norm.default: _group_norm,
}
