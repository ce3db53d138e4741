"""Products with a Hessian in float32, for norms of which no digit is asked for.

Double backward passes of convolutions take five times as long in float64 as in float32 on a CPU, other operations
twice. Far from a fit the norm of R is larger than the eigenvalues of P, and only its size is of interest.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Generator, Tensor

from lightning_basin.network.layers import Layer
from lightning_basin.network.rounding import in_other_precision
from lightning_basin.network.speed import has_slow_float64
from lightning_basin.quantities.hessian.products import HessianOperator, hessian_operator
from lightning_basin.quantities.hessian.quadratic_model import QuadraticModel

_LEAST_ELEMENTS = 2**23
"""Least number of inputs times parameters for which the second network pays: at fewer its copy takes longer."""

_NOISE_SAFETY = 100.0
"""Factor by which the rounding of a product with a random vector may be smaller than it is with another one.

A random unit vector has no less than a hundredth of the mean share in any given direction, but for one in a hundred.
"""

_UNDERFLOW = 2.0**-100
"""What float32 takes for zero, as a fraction of numbers near 1: it holds numbers down to 2 ** -149."""


class RoundedModel:
    """A quadratic model in float64, or its linear part, and the same in float32 when this is first asked for.

    Attributes:
        pays: Whether products in float64 take much longer, on this device and for a network of this size.
        agrees: Whether float32 was found to have the digits of all of the Hessian.
    """

    def __init__(self, model: QuadraticModel) -> None:
        self.model = model
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters)
        device = model.outputs.device
        is_slow = device.type == "cpu" or has_slow_float64(device)
        is_large = len(model.outputs) * self.num_parameters >= _LEAST_ELEMENTS
        self.pays = is_slow and is_large and len(model.chunks) == 1  # Chunks are for models that hardly fit once.
        self.agrees = False

    def operator(self, layers: Sequence[Layer]) -> HessianOperator:
        """Return products in float32 with the diagonal block of some layers."""
        multiply, scale = hessian_operator(self._rounded, layers), self._scale
        return lambda direction: scale * multiply(direction.to(torch.float32)).to(direction.dtype)

    def vanishing_norm(self, layers: Sequence[Layer]) -> float | None:
        """Return a bound on the norm of a diagonal block that is zero, as of each layer of a ReLU network in R.

        It is ``None`` where the block is not zero, or float32 was not found to have the digits of all blocks together.
        """
        if not self.agrees:
            return None
        num_parameters = sum(layer.num_parameters for layer in layers)
        direction = torch.randn(num_parameters, generator=Generator().manual_seed(0), dtype=torch.float64)
        product = self.operator(layers)(direction.to(self.model.outputs.device))
        return None if bool(product.any()) else _UNDERFLOW * self._scale

    @cached_property
    def _scale(self) -> float:
        """The size of the derivatives of the loss: float32 has not the exponents of small ones."""
        curvature = self.model.curvature
        largest = curvature.slope.abs().max()
        if not self.model.is_linear:
            largest = largest.maximum(curvature.matrices.abs().max())
        return float(largest)

    @cached_property
    def _rounded(self) -> QuadraticModel:
        model, curvature, scale = self.model, self.model.curvature, self._scale
        network, probe = in_other_precision(model.network, model.probe)
        slope, matrices = ((tensor / scale).to(torch.float32) for tensor in (curvature.slope, curvature.matrices))
        return replace(
            model,
            network=network,
            probe=probe,
            curvature=replace(curvature, slope=slope, matrices=matrices, factors=None),
            outputs=model.outputs.to(torch.float32),
        )


class BlockOperator:
    """Products with a diagonal block of H or R: in float64, until float32 is said to be enough."""

    def __init__(self, rounded: RoundedModel, layers: Sequence[Layer]) -> None:
        self._rounded, self._layers = rounded, layers
        self._multiply = hessian_operator(rounded.model, layers)
        self._first: tuple[Tensor, Tensor] | None = None  # A direction, random in part, and its product in float64.
        self._may_round = rounded.pays

    def __call__(self, direction: Tensor) -> Tensor:
        """Multiply a direction in the parameters of the layers."""
        product = self._multiply(direction)
        if self._may_round and self._first is None:
            self._first = direction, product
        return product

    def round_products(self) -> float:
        """Take products in float32 from now on, where it has the digits and is faster.

        Return a bound on the norm by which the new operator differs from the block; 0 where it stays the same.
        """
        if not self._may_round or self._first is None:
            return 0.0
        self._may_round, (direction, expected), self._first = False, self._first, None
        try:
            multiply = self._rounded.operator(self._layers)
            difference = multiply(direction) - expected
        except (RuntimeError, TypeError, ValueError):  # Not every module runs in float32, or fits in twice.
            return 0.0
        noise, norm = torch.stack([difference.norm(), expected.norm()]).tolist()
        noise *= _NOISE_SAFETY * len(direction) ** 0.5
        if not noise <= norm / 2:
            return 0.0
        self._multiply = multiply
        self._rounded.agrees |= len(direction) == self._rounded.num_parameters
        return float(noise)
