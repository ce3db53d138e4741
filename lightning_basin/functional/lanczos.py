"""The norm of a symmetric operator that is known by its products only, with a bound from above."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

FAILURE_PROBABILITY = 1e-9
"""The probability with which a random start vector may hide an eigenvalue above the bound."""

_SYMMETRY_RTOL = 1e-8  # asymmetry to allow, relative to the largest entry: rounding is near 1e-14, wrong formulas 1e-2
_EXHAUSTED_RTOL = 1e-13  # a residual norm below this fraction of the operator's norm is rounding
_NUM_CANDIDATES = 64  # points of the grid on which the Lanczos polynomial is compared with its limit
_NUM_REFINEMENTS = 3  # times that the interval between two points of the grid becomes the next grid

_Vector = npt.NDArray[np.float64]
"""A vector with one element for each product: so few that no kernel is worth its launch."""


@dataclass(frozen=True, kw_only=True)
class NormBound:
    """Bounds on the spectral norm after some products.

    Attributes:
        value: The largest magnitude of a Ritz value: never above the norm, except by rounding.
        residual: The norm of the Ritz vector's residual: an eigenvalue lies within it of the Ritz value.
        upper: The norm is at most this, except with the failure probability; exact where the Krylov space is
            exhausted.
        num_products: The number of products with the operator.
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
        product: From a vector to the operator's product with it, both of shape ``(n,)``.
        num_rows: The number n of the operator's rows.
        generator: A generator on the CPU, for the start vector.
        max_products: The largest number of products; fewer where the Krylov space is exhausted, n at the latest.
        like: A tensor on the device of the vectors; ``None`` means the CPU.
        atol: The asymmetry to allow beside 1e-8 of the largest entry.
        failure_probability: The probability that a bound is too low.

    Yields:
        The bounds after each product.

    Raises:
        RuntimeError: If the operator is not symmetric.

    Example:
        >>> diagonal = torch.tensor([1.0, -3.0], dtype=torch.float64)
        >>> *_, bound = norm_bounds(lambda v: diagonal * v, 2, generator=torch.Generator(), max_products=2)
        >>> round(bound.value, 9), round(bound.upper, 9), bound.num_products
        (3.0, 3.0, 2)
    """
    start = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    vector = (start / start.norm()).to("cpu" if like is None else like.device)
    max_products = min(max_products, num_rows)
    basis = vector.new_empty(max_products, num_rows)
    tridiagonal = np.zeros((max_products, max_products))  # Alphas on the diagonal, betas beside it.
    betas: list[float] = []
    log_limit = 0.5 * math.log(2 * num_rows / math.pi) - math.log(failure_probability)
    for count in range(1, max_products + 1):
        basis[count - 1] = vector
        remainder, coefficients = _orthogonalized(product(vector), basis[:count])
        _check_tridiagonal(coefficients, betas, atol)
        tridiagonal[count - 1, count - 1] = coefficients[-1]
        residual_norm = float(remainder.norm())
        ritz_values, ritz_vectors = np.linalg.eigh(tridiagonal[:count, :count])
        largest = int(np.abs(ritz_values).argmax())
        value, residual = abs(float(ritz_values[largest])), residual_norm * abs(float(ritz_vectors[-1, largest]))
        if count == num_rows or residual_norm <= _EXHAUSTED_RTOL * max(value, *betas, 0.0):
            yield NormBound(value=value, residual=residual, upper=value + residual, num_products=count)
            return
        betas.append(residual_norm)
        upper = max(_polynomial_bound(sign * ritz_values, betas, log_limit) for sign in (1, -1))
        yield NormBound(value=value, residual=residual, upper=upper, num_products=count)
        if count < max_products:
            tridiagonal[count, count - 1] = tridiagonal[count - 1, count] = residual_norm
            vector = remainder / residual_norm


def _orthogonalized(vector: Tensor, basis: Tensor) -> tuple[Tensor, _Vector]:
    """The part of a vector that is orthogonal to an orthonormal basis, and its coefficients in the basis."""
    coefficients = basis @ vector
    vector = vector - coefficients @ basis
    correction = basis @ vector  # A second time: one pass leaves rounding where much has cancelled.
    return vector - correction @ basis, (coefficients + correction).cpu().numpy()


def _check_tridiagonal(coefficients: _Vector, betas: list[float], atol: float) -> None:
    """Refuse a product with the newest basis vector that has parts along older ones than the newest two.

    Args:
        coefficients: The coefficients of the product in the basis, the newest last.
        betas: The norms of the earlier residuals; the last one is the coefficient that symmetry asks for.
        atol: The asymmetry to allow.
    """
    expected = np.zeros(len(coefficients) - 1)
    if betas:
        expected[-1] = betas[-1]
    asymmetry = float(np.abs(coefficients[:-1] - expected).max()) if betas else 0.0
    check_symmetry(asymmetry, max(float(np.abs(coefficients).max()), *betas, 0.0), atol=atol)


def check_symmetry(asymmetry: float, scale: float, *, atol: float = 0.0) -> None:
    """Refuse second derivatives that are not symmetric.

    Args:
        asymmetry: The largest difference of two entries that should be equal.
        scale: The largest magnitude of an entry.
        atol: The asymmetry to allow beside 1e-8 of the largest entry.

    Raises:
        RuntimeError: If the difference is larger.
    """
    if asymmetry > _SYMMETRY_RTOL * scale + atol:
        raise RuntimeError(
            f"the Hessian must be symmetric, but entries differ by {asymmetry:.1e} of {scale:.1e}: an operation of the "
            f"network or the loss has a wrong second derivative"
        )


def _polynomial_bound(ritz_values: _Vector, betas: list[float], log_limit: float) -> float:
    """The point right of all Ritz values where the logarithm of the Lanczos polynomial is ``log_limit``."""
    last = float(ritz_values.max())
    level = log_limit + sum(map(math.log, betas))
    lowest, highest = 0.0, math.exp(level / len(betas))  # Distances from the last: each factor is at least as large.
    for _ in range(_NUM_REFINEMENTS):
        distances = np.linspace(lowest, highest, _NUM_CANDIDATES)
        with np.errstate(divide="ignore"):
            logarithms = np.log(distances[:, None] + (last - ritz_values)).sum(1)
        first = min(int((logarithms < level).sum()), _NUM_CANDIDATES - 1)
        lowest, highest = float(distances[max(first - 1, 0)]), float(distances[first])
    return last + highest
