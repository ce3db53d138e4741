"""Brackets of the Hessian's nullities, from eigenvalues of P and from norms that some products bound."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Generator

from lightning_basin.functional.lanczos import NormBound, norm_bounds
from lightning_basin.functional.null_space import NullSpace, null_space_bracket
from lightning_basin.functional.rank import EPSILON, Spectrum
from lightning_basin.limits import LAYER_PRODUCTS, NETWORK_PRODUCTS, HessianLimits
from lightning_basin.quantities.hessian.loss import LossCurvature
from lightning_basin.quantities.hessian.products import ROUNDING_FACTOR, hessian_operator
from lightning_basin.quantities.hessian.quadratic_model import QuadraticModel
from lightning_basin.quantities.scopes import Scope

_SLACK = 2.0  # factor within which the norm of R is bounded
_DENSE_SLACK = 1.01  # factor within which it is bounded where products are cheap beside all of H
_LARGEST_PRODUCTS = 30  # most products for the largest eigenvalue of H
_LARGEST_RTOL = 1e-3  # error of the largest eigenvalue of H: it is a scale, of which three digits are enough


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockNorms:
    """Norms of diagonal blocks of R and H, as Lanczos iterations bound them.

    Attributes:
        model: The quadratic model of the loss.
        generator: A generator on the CPU, for start vectors.
        limits: The limits of memory.
        is_dense: Whether the Hessian is formed too, beside which products are cheap.
    """

    model: QuadraticModel
    generator: Generator
    limits: HessianLimits
    is_dense: bool

    def residual(
        self, scope: Scope, *, steepest: float, smallest: float | None, known: float, max_products: int
    ) -> float:
        """Bound the norm of a block of R from above.

        Args:
            scope: The scope whose block it is.
            steepest: The largest eigenvalue of P.
            smallest: The smallest nonzero eigenvalue of P; ``None`` for P = 0.
            known: A bound that is known already; infinite for none.
            max_products: The largest number of products.
        """
        residual, is_bounded = known, known < float("inf")
        if residual == 0:
            return residual
        slack = _DENSE_SLACK if self.is_dense else _SLACK
        atol = ROUNDING_FACTOR * EPSILON * (max(steepest, known) if is_bounded else steepest)
        for bound in self._bounds(self.model.linear_part, scope, atol, max_products):
            residual = min(known, bound.upper * (1 + self.model.slope_uncertainty))
            if _is_settled(bound, residual, smallest, slack, is_bounded=is_bounded):
                break
        return residual

    def largest(self, scope: Scope, *, steepest: float, max_products: int) -> float | None:
        """Find the largest magnitude of an eigenvalue of a block of H; ``None`` if it is not found to three digits."""
        atol = ROUNDING_FACTOR * EPSILON * steepest * max(1.0, self.model.cancellation)
        for bound in self._bounds(self.model, scope, atol, min(max_products, _LARGEST_PRODUCTS)):
            if bound.residual <= _LARGEST_RTOL * bound.value:
                return bound.value
        return None

    def _bounds(self, model: QuadraticModel, scope: Scope, atol: float, max_products: int) -> Iterator[NormBound]:
        max_vectors = self.limits.basis_elements // scope.num_parameters
        return norm_bounds(
            hessian_operator(model, scope.layers),
            scope.num_parameters,
            generator=self.generator,
            max_products=max(1, min(max_products, max_vectors)),
            like=model.outputs,
            atol=atol,
        )


def _is_settled(bound: NormBound, residual: float, smallest: float | None, slack: float, *, is_bounded: bool) -> bool:
    """Whether further products would change neither the certified count nor, by more than the slack, the bound."""
    is_tight = bound.upper <= slack * bound.value
    is_certified = smallest is not None and 2 * residual < smallest
    is_hopeless = smallest is None or 2 * bound.value >= smallest
    return (is_certified and (is_tight or is_bounded)) or (is_hopeless and is_tight)


def bracket_null_spaces(
    scopes: Sequence[Scope],
    spectra: Mapping[Scope, Spectrum],
    loss: LossCurvature,
    norms: BlockNorms | None,
    *,
    rtol: float | None,
) -> dict[Scope, NullSpace]:
    """Bracket the nullity of each scope's diagonal block.

    Args:
        scopes: The scopes to report, the network last.
        spectra: The singular values of rows whose products are P, for each scope.
        loss: The loss at the outputs.
        norms: The source of bounds on the norms of R and H; ``None`` takes no product.
        rtol: The relative tolerance on eigenvalues; ``None`` means the rounding of the arithmetic.

    Raises:
        RuntimeError: If a product is not finite, or the Hessian not symmetric.
    """
    scale = loss.gradient_scale or 1.0

    def bracket(scope: Scope, residual: float | None, largest: float | None = None) -> NullSpace:
        return null_space_bracket(
            scope.num_parameters, spectra[scope], residual=residual, scale=scale, largest=largest, rtol=rtol
        )

    if loss.is_exact or norms is None:
        return {scope: bracket(scope, 0.0 if loss.is_exact else None) for scope in scopes}

    def bracket_by_products(scope: Scope, known: float, max_products: int) -> NullSpace:
        steepest = scale * float(spectra[scope].singular_values.max()) ** 2
        smallest = bracket(scope, None).smallest
        residual = norms.residual(scope, steepest=steepest, smallest=smallest, known=known, max_products=max_products)
        largest: float | None = steepest
        if residual > _LARGEST_RTOL * steepest:  # Else R moves the largest eigenvalue of P in no digit that counts.
            largest = norms.largest(scope, steepest=steepest, max_products=max_products)
        return bracket(scope, residual, largest)

    *inner_scopes, network = scopes
    brackets = {network: bracket_by_products(network, float("inf"), NETWORK_PRODUCTS)}
    known = brackets[network].residual or 0.0  # A block of R is not larger than R.
    max_products = max(1, LAYER_PRODUCTS // max(1, len(inner_scopes)))
    return {scope: bracket_by_products(scope, known, max_products) for scope in inner_scopes} | brackets
