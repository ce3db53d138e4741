"""Code of the user, run in the precision of the evaluation, whatever precision it asks for."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_basin.tensors import as_dtype, map_tensors, tensors_of

_RAISED: Mapping[torch.dtype, Mapping[torch.dtype, torch.dtype]] = {
    torch.float64: {
        torch.float16: torch.float64,
        torch.bfloat16: torch.float64,
        torch.float32: torch.float64,
        torch.complex64: torch.complex128,
    },
    torch.float32: {torch.float16: torch.float32, torch.bfloat16: torch.float32},
}
_RAISED_CASTS: Mapping[torch.dtype, Mapping[Callable[..., Any], Callable[..., Any]]] = {
    torch.float64: {
        Tensor.float: Tensor.double,
        Tensor.half: Tensor.double,
        Tensor.bfloat16: Tensor.double,
        Tensor.cfloat: Tensor.cdouble,  # type: ignore[attr-defined]  # not in the stubs of torch 2.13
    },
    torch.float32: {Tensor.half: Tensor.float, Tensor.bfloat16: Tensor.float},
}
_TENSOR_TYPE = re.compile(r"torch\.(?:cuda\.)?(Float|Half|BFloat16)Tensor")
_TENSOR_TYPES = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16}


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight normalization by its formula (Salimans and Kingma, 2016, equation 2): g v / |v|."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_PLAIN: Mapping[Callable[..., Any], Callable[..., Any]] = {torch._weight_norm: _weight_norm}
"""Formulas of fused operations whose second derivative is wrong on the CPU (torch 2.13)."""

_DRAWN = frozenset([torch.rand, torch.randn, torch.normal])
"""Functions that draw other numbers at a second call."""

_MAY_ASK = frozenset([torch.dtype, str, type(torch.FloatTensor)])
"""Types of arguments that can ask for a precision."""


class RaisedPrecision(TorchFunctionMode):
    """Inside this mode, code that asks for a lower precision (by dtype, by method or by default) gets ``dtype``.

    Attention and normalization layers often ask for float32 by name (``softmax(..., dtype=torch.float32)``); the
    rounding of that one line would fill the null space. The default dtype itself stays as it is: it belongs to all
    threads of the process, and some of them may be making batches for training.

    The mode delays every call of torch. So it is entered only around code of the user: a copy that is made or run, a
    loss. Backward passes run outside of it, and nesting it changes nothing. A mode below autograd would see less: it
    gets ``torch.tensor(1 / 3)`` after this was rounded to float32, and inside of one no module can make a tensor of a
    subclass (torch 2.13).
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._raised_dtypes = _RAISED[dtype]
        self._raised_casts = _RAISED_CASTS[dtype]
        # Autocast leaves float64 alone.
        self._autocast_device_types = ("cpu", "cuda") if dtype == torch.float32 else ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for device_type in self._autocast_device_types:
            if torch.is_autocast_enabled(device_type):  # The module itself has enabled it.
                with torch.autocast(device_type, enabled=False):
                    return self.__torch_function__(func, types, args, kwargs)
        func = _PLAIN.get(func) or self._raised_casts.get(func, func)
        # Fast where a call asks for no precision, as do most of the thousands in each measurement.
        raised = args if _MAY_ASK.isdisjoint(map(type, args)) else tuple(map(self._raised, args))
        named = {name: self._raised(argument) for name, argument in kwargs.items()} if kwargs else {}
        has_dtype = named.get("dtype") is not None or any(isinstance(argument, torch.dtype) for argument in raised)
        if func in _DRAWN and not has_dtype and not tensors_of((raised, named)):
            named["dtype"] = self._dtype  # Before the call: a second one would draw other numbers.
        try:
            result = func(*raised, **named)
        except RuntimeError:
            # A constant has a lower precision, as it is kept in a place that is not copied.
            tensors = tensors_of((raised, named))
            if not any(tensor.dtype in self._raised_dtypes and not tensor.requires_grad for tensor in tensors):
                raise
            return func(*map_tensors(self._raised_constant, raised), **map_tensors(self._raised_constant, named))
        if isinstance(result, Tensor) and (result.dtype in self._raised_dtypes or self._is_default(result, has_dtype)):
            return self._without_default(func, raised, named, result)
        return result

    def _is_default(self, result: Tensor, has_dtype: bool) -> bool:  # noqa: FBT001 - whether a dtype was asked for
        """Whether a result is more precise than the evaluation because the default dtype is."""
        return (
            result.dtype == torch.float64 != self._dtype
            and not has_dtype
            and torch.get_default_dtype() == torch.float64
        )

    def _without_default(
        self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], result: Tensor
    ) -> Tensor:
        """Return the result again in the precision of the evaluation, if it was that of the default dtype.

        No argument has it in ``zeros(2)`` and ``arange(2) / 2``.
        """
        tensors = tensors_of((args, named))
        if any(tensor.dtype == result.dtype for tensor in tensors):
            return result
        dtype = self._raised_dtypes.get(result.dtype, self._dtype)
        attempts = [(args, {**named, "dtype": dtype})]
        if tensors:  # Integers get the default dtype when they are divided, for example.
            attempts.insert(0, (map_tensors(self._as_real, args), map_tensors(self._as_real, named)))
        for arguments, keywords in attempts:
            try:
                again = func(*arguments, **keywords)
            except (TypeError, ValueError, RuntimeError):  # A function without dtype, or of integers only.
                continue
            if isinstance(again, Tensor) and again.dtype == dtype:
                return again
        return result.to(dtype)

    def _as_real(self, tensor: Tensor) -> Tensor:
        is_real = tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized
        return tensor if is_real else tensor.to(self._dtype)

    def _raised_constant(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.requires_grad else as_dtype(tensor, self._dtype)

    def _raised(self, argument: Any) -> Any:
        if isinstance(argument, torch.dtype):
            return self._raised_dtypes.get(argument, argument)
        if isinstance(argument, str | type(torch.FloatTensor)):  # As in tensor.type("torch.FloatTensor").
            name = argument if isinstance(argument, str) else f"{argument.__module__}.{argument.__name__}"
            match = _TENSOR_TYPE.fullmatch(name)
            return argument if match is None else self._raised_dtypes.get(_TENSOR_TYPES[match[1]], argument)
        return argument
