"""The norm of a symmetric operator that is known by its products only, with a bound from above."""

import math
from collections.abc import Sequence
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
_RANDOM_SHARE = 0.3  # length of the random vector that is added to a start vector, relative to it
_NUM_REFINEMENTS = 3  # times that the interval between two points of the grid becomes the next grid

_Vector = npt.NDArray[np.float64]
"""A vector with one element for each product: so few that no kernel is worth its launch."""


@dataclass(frozen=True, kw_only=True)
class NormBound:
    """Bounds on the spectral norm after some products.

    Attributes:
        value: The largest magnitude of a Ritz value.
        lower: The norm is at least this, except by rounding: the norm of the operator on the Krylov space.
        residual: The norm of the Ritz vector's residual: an eigenvalue lies within it of the Ritz value.
        gap: The distance of the Ritz value from the nearest other one; 0 where there is none.
        rival: The largest magnitude that an eigenvalue within the residual of another Ritz value may have.
        upper: The norm is at most this, except with the failure probability; exact where the Krylov space is
            exhausted.
        forecast: What ``upper`` may become within the largest number of products, if these show nothing new.
        num_products: The number of products with the operator.
    """

    value: float
    lower: float
    residual: float
    gap: float
    rival: float
    upper: float
    forecast: float
    num_products: int


class NormIteration:
    r"""A Lanczos iteration that bounds the largest magnitude of an eigenvalue, one product at a time.

    Lanczos with full reorthogonalization from a random unit vector v. Its next basis vector is :math:`p_k(A) v`, with
    :math:`p_k(\lambda) = \prod_i (\lambda - \theta_i) / \beta_i` over the Ritz values. It has unit length, so that an
    eigenvalue of which v has the part :math:`\gamma` obeys :math:`|\gamma\, p_k(\lambda)| \le 1`. A random part is
    below :math:`\delta` with probability at most :math:`\delta \sqrt{2 n / \pi}`; and outside of the Ritz values
    :math:`p_k` grows, so that :math:`|p_k(\lambda)| = 1 / \delta` bounds the eigenvalue (van Dorsselaer, Hochstenbach
    and van der Vorst, 2000). No gap is assumed; where Lanczos has converged the bound shows it.

    Args:
        num_rows: The number n of the operator's rows.
        generator: A generator on the CPU, for the start vector.
        max_products: The largest number of products; fewer where the Krylov space is exhausted, n at the latest.
        like: A tensor on the device of the vectors; ``None`` means the CPU.
        atol: The asymmetry to allow beside 1e-8 of the largest entry.
        failure_probability: The probability that a bound is too low.
        near: A vector near the eigenvector that is looked for, to which a smaller random one is added: the Ritz value
            then converges sooner, and the bound from above later. ``None`` for none.

    Attributes:
        vector: The unit vector to be multiplied next.
        is_finished: Whether no further product is taken.

    Example:
        >>> diagonal = torch.tensor([1.0, -3.0], dtype=torch.float64)
        >>> iteration = NormIteration(2, generator=torch.Generator(), max_products=2)
        >>> while not iteration.is_finished:
        ...     (bound,) = next_bounds([iteration], [diagonal * iteration.vector])
        >>> round(bound.lower, 9), round(bound.upper, 9), bound.num_products
        (3.0, 3.0, 2)
    """

    def __init__(
        self,
        num_rows: int,
        *,
        generator: Generator,
        max_products: int,
        like: Tensor | None = None,
        atol: float = 0.0,
        failure_probability: float = FAILURE_PROBABILITY,
        near: Tensor | None = None,
    ) -> None:
        start = torch.randn(num_rows, generator=generator, dtype=torch.float64)
        self.vector = (start / start.norm()).to("cpu" if like is None else like.device)
        if near is not None:
            self.vector = near / near.norm() + _RANDOM_SHARE * self.vector
            self.vector /= self.vector.norm()
            failure_probability *= _RANDOM_SHARE / (1 + _RANDOM_SHARE)  # The random part is so much smaller, or less.
        self.is_finished = False
        self._num_rows, self._max_products, self._atol = num_rows, min(max_products, num_rows), atol
        self._noise = 0.0
        self._basis = self.vector.new_empty(self._max_products, num_rows)
        self._remainder = self.vector
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._weights = np.ones(0)
        self._log_limit = 0.5 * math.log(2 * num_rows / math.pi) - math.log(failure_probability)

    def accept_noise(self, norm: float) -> None:
        """Bound the norm of the same operator by products with another one from now on, as in a lower precision.

        Args:
            norm: A bound on the norm of the difference of the two operators.
        """
        self._noise = max(self._noise, norm)
        self._atol += norm

    def orthogonalize(self, product: Tensor) -> Tensor:
        """Take the parts along all basis vectors out of the product with the newest.

        Args:
            product: The operator's product with ``vector``, shape ``(n,)``.

        Returns:
            What `bound` needs of the result, on the device of the product.
        """
        count = len(self._alphas) + 1
        self._basis[count - 1] = self.vector
        # The newest two hold nearly all of it. What rounding leaves along any is small, and goes in a second step.
        alpha = torch.dot(self.vector, product)
        remainder = product - alpha * self.vector
        if self._betas:
            remainder -= self._betas[-1] * self._basis[count - 2]
        correction = self._basis[:count] @ remainder
        self._remainder = remainder - correction @ self._basis[:count]
        return torch.cat([correction, torch.stack([alpha, self._remainder.norm()])])

    def bound(self, numbers: _Vector) -> NormBound:
        """Bound the norm, and make ``vector`` the next one.

        Args:
            numbers: What `orthogonalize` has returned.

        Raises:
            RuntimeError: If the operator is not symmetric.
        """
        correction, alpha, residual_norm = numbers[:-2], float(numbers[-2] + numbers[-3]), float(numbers[-1])
        self._check_symmetry(correction, alpha)
        self._alphas.append(alpha)
        count = len(self._alphas)
        tridiagonal = np.diag(self._alphas) + np.diag(self._betas, 1) + np.diag(self._betas, -1)
        ritz_values, ritz_vectors = np.linalg.eigh(tridiagonal)
        largest = int(np.abs(ritz_values).argmax())
        residuals = residual_norm * np.abs(ritz_vectors[-1])
        value, residual = abs(float(ritz_values[largest])), float(residuals[largest])
        others = np.arange(count) != largest
        gap = float(np.abs(ritz_values - ritz_values[largest])[others].min()) if count > 1 else 0.0
        rival = float((np.abs(ritz_values) + residuals)[others].max(initial=0.0))
        self._weights = ritz_vectors[:, largest]
        is_exhausted = count == self._num_rows or residual_norm <= _EXHAUSTED_RTOL * max(value, *self._betas, 0.0)
        self.is_finished = is_exhausted or count == self._max_products
        if is_exhausted:
            upper = forecast = value + residual
        else:
            self._betas.append(residual_norm)
            upper = max(_polynomial_bound(sign * ritz_values, self._betas, self._log_limit) for sign in (1, -1))
            # As if the polynomial went on to grow as it does on the average of its factors.
            growth = math.exp(self._log_limit * (1 / self._max_products - 1 / count))
            forecast = max(value, growth * upper)
            self.vector = self._remainder / residual_norm
        return NormBound(
            value=value,
            lower=float(np.linalg.norm(np.vstack([tridiagonal, [*[0.0] * (count - 1), residual_norm]]), 2)),
            residual=residual,
            gap=gap,
            rival=rival,
            upper=upper + self._noise,
            forecast=forecast + self._noise,
            num_products=count,
        )

    def ritz_vector(self) -> Tensor:
        """Return the Ritz vector of the largest Ritz value, of unit length, shape ``(n,)``."""
        weights = torch.from_numpy(self._weights).to(self._basis)
        vector: Tensor = weights @ self._basis[: len(weights)]
        return vector

    def _check_symmetry(self, correction: _Vector, alpha: float) -> None:
        """Refuse a product that has parts along older basis vectors than the newest two, or another part than beta."""
        asymmetry = float(np.abs(correction[:-1]).max()) if self._betas else 0.0
        check_symmetry(asymmetry, max(abs(alpha), *self._betas, 0.0), atol=self._atol)


def next_bounds(iterations: Sequence[NormIteration], products: Sequence[Tensor]) -> list[NormBound]:
    """Bound the norms of several operators after one more product each, with one transfer from the device.

    Args:
        iterations: The iterations, none of which is finished.
        products: The product of each operator with the vector of its iteration.

    Raises:
        FloatingPointError: If a product is not finite.
        RuntimeError: If an operator is not symmetric.
    """
    parts = [iteration.orthogonalize(product) for iteration, product in zip(iterations, products, strict=True)]
    numbers = torch.cat(parts).cpu().numpy()
    if not np.isfinite(numbers).all():
        raise FloatingPointError("products with an operator must be finite, but have elements that are not")
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return [iteration.bound(part) for iteration, part in zip(iterations, np.split(numbers, ends), strict=True)]


def check_symmetry(asymmetry: float, scale: float, *, atol: float = 0.0) -> None:
    """Refuse second derivatives whose asymmetry is larger than ``atol`` and 1e-8 of the largest entry together."""
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
