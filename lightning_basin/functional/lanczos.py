"""The norm of a symmetric operator that is known by its products only, with a bound from above."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

FAILURE_PROBABILITY = 1e-9
"""With which a random start vector may hide an eigenvalue above the bound."""

_Vector = npt.NDArray[np.float64]  # What is as small as the number of products: no kernel is worth its launch.

_SYMMETRY_RTOL = 1e-8  # of the largest coefficient; rounding is near 1e-14, a wrong derivative near 1e-2
_EXHAUSTED_RTOL = 1e-13  # what is left of a product whose direction is inside the Krylov space already
_CANDIDATES = 64  # at once, where the bound is searched for
_REFINEMENTS = 3  # of the interval that holds it, by the number of candidates each


@dataclass(frozen=True, kw_only=True)
class NormBound:
    """What is known of the spectral norm after some products.

    Attributes:
        value: Largest magnitude of a Ritz value: never above the norm, beside rounding.
        residual: Norm of the Ritz vector's residual: an eigenvalue lies within it of the Ritz value.
        upper: The norm is at most this, except with the failure probability; exact where the Krylov space is
            exhausted.
        num_products: With the operator.
    """

    value: float
    residual: float
    upper: float
    num_products: int


def norm_bounds(
    product: Callable[[Tensor], Tensor],
    num_rows: int,
    *,
    generator: Generator,
    max_products: int,
    like: Tensor | None = None,
    atol: float = 0.0,
    failure_probability: float = FAILURE_PROBABILITY,
) -> Iterator[NormBound]:
    r"""Bound the largest magnitude of an eigenvalue from both sides, better with every product.

    Lanczos with full reorthogonalization from a random unit vector v. Its next basis vector is :math:`p_k(A) v`, with
    :math:`p_k(\lambda) = \prod_i (\lambda - \theta_i) / \beta_i` over the Ritz values. It has unit length, so that an
    eigenvalue of which v has the part :math:`\gamma` obeys :math:`|\gamma\, p_k(\lambda)| \le 1`. A random part is
    below :math:`\delta` with probability at most :math:`\delta \sqrt{2 n / \pi}`; and outside of the Ritz values
    :math:`p_k` grows, so that :math:`|p_k(\lambda)| = 1 / \delta` bounds the eigenvalue (van Dorsselaer, Hochstenbach
    and van der Vorst, 2000). No gap is assumed; where Lanczos has converged the bound shows it.

    Args:
        product: From a vector to the operator's product with it, shapes ``(n,)``.
        num_rows: n.
        generator: On the CPU; for the start vector.
        max_products: Stop after so many; sooner where the Krylov space is exhausted, at the latest after n.
        like: Gives the device; ``None`` means the CPU.
        atol: Asymmetry to allow beside 1e-8 of the largest coefficient.
        failure_probability: That of a bound being too low.

    Yields:
        What is known after each product.

    Raises:
        RuntimeError: If the operator is not symmetric.

    Example:
        >>> diagonal = torch.tensor([1.0, -3.0], dtype=torch.float64)
        >>> *_, bound = norm_bounds(lambda v: diagonal * v, 2, generator=torch.Generator(), max_products=2)
        >>> round(bound.value, 9), round(bound.upper, 9), bound.num_products
        (3.0, 3.0, 2)
    """
    start = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    direction = (start / start.norm()).to("cpu" if like is None else like.device)
    max_products = min(max_products, num_rows)
    basis = direction.new_empty(max_products, num_rows)
    projected = np.zeros((max_products, max_products))
    log_reach = 0.5 * math.log(2 * num_rows / math.pi) - math.log(failure_probability)
    offsets: list[float] = []
    for count in range(1, max_products + 1):
        basis[count - 1] = direction
        known = basis[:count]
        vector = product(direction)
        coefficients = known @ vector
        vector = vector - coefficients @ known
        correction = known @ vector  # A second time: one pass leaves rounding where much has cancelled.
        vector = vector - correction @ known
        column = (coefficients + correction).cpu().numpy()
        _check_symmetric(column, offsets, atol)
        offset = float(vector.norm())
        projected[count - 1, count - 1] = column[-1]
        ritz, vectors = np.linalg.eigh(projected[:count, :count])
        largest = int(np.abs(ritz).argmax())
        value, residual = abs(float(ritz[largest])), offset * abs(float(vectors[-1, largest]))
        if count == num_rows or offset <= _EXHAUSTED_RTOL * max(value, *offsets, 0.0):
            yield NormBound(value=value, residual=residual, upper=value + residual, num_products=count)
            return
        offsets.append(offset)
        upper = max(_reach(ritz, offsets, log_reach), _reach(-ritz, offsets, log_reach))
        yield NormBound(value=value, residual=residual, upper=upper, num_products=count)
        if count < max_products:
            projected[count, count - 1] = projected[count - 1, count] = offset
            direction = vector / offset


def _check_symmetric(column: _Vector, offsets: list[float], atol: float) -> None:
    """A product with the newest vector may have parts along the two newest only, the older of them known before."""
    expected = np.zeros(len(column) - 1)
    if offsets:
        expected[-1] = offsets[-1]
    asymmetry = float(np.abs(column[:-1] - expected).max()) if offsets else 0.0
    scale = max(float(np.abs(column).max()), *offsets, 0.0)
    if asymmetry > _SYMMETRY_RTOL * scale + atol:
        raise RuntimeError(
            f"the Hessian must be symmetric, but entries differ by {asymmetry:.1e} of {scale:.1e}: an operation of the "
            f"network or the loss has a wrong second derivative"
        )


def _reach(ritz: _Vector, offsets: list[float], log_reach: float) -> float:
    """The point right of all Ritz values where the logarithm of the Lanczos polynomial is ``log_reach``."""
    last = float(ritz.max())
    level = log_reach + sum(map(math.log, offsets))
    lowest, highest = 0.0, math.exp(level / len(offsets))  # Distances from the last: each factor is at least that.
    for _ in range(_REFINEMENTS):
        distances = np.linspace(lowest, highest, _CANDIDATES)
        with np.errstate(divide="ignore"):
            logarithms = np.log(distances[:, None] + (last - ritz)).sum(1)
        first = min(int((logarithms < level).sum()), _CANDIDATES - 1)
        lowest, highest = float(distances[max(first - 1, 0)]), float(distances[first])
    return last + highest
