"""Brackets of the Hessian's nullities, from eigenvalues of P and from norms that some products bound."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Generator

from lightning_basin.functional.bracket import GaussNewtonEigenvalues, NullSpace
from lightning_basin.functional.lanczos import NormBound, NormIteration, next_bounds
from lightning_basin.functional.rank import EPSILON
from lightning_basin.limits import LAYER_PRODUCTS, NETWORK_PRODUCTS, HessianLimits
from lightning_basin.quantities.hessian.products import ROUNDING_FACTOR, check_finite, hessian_operator
from lightning_basin.quantities.hessian.quadratic_model import QuadraticModel
from lightning_basin.quantities.scopes import Scope

_SLACK = 2.0  # factor within which the norm of R is bounded
_HOPELESS_SLACK = 4.0  # the same where no bound closes the bracket, nor moves its end by a hundredth of the rank
_CERTIFIED_SLACK = 10.0  # the same where every count is decided: the norm is then a point on a logarithmic axis
_LARGEST_PRODUCTS = 30  # most products for the largest eigenvalue of H
_LEAST_PRODUCTS = 8  # fewer hardly ever find it
_LARGEST_RTOL = 1e-3  # error of the largest eigenvalue of H: it is a scale, of which three digits are enough

_Judge = Callable[[NormBound], tuple[float | None, bool]]
"""From bounds on the norm of a block to what is known of it, and whether no further product is needed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockNorms:
    """Norms of diagonal blocks of R and H, as Lanczos iterations bound them.

    Attributes:
        model: The quadratic model of the loss.
        generator: A generator on the CPU, for start vectors.
        limits: The limits of memory.
    """

    model: QuadraticModel
    generator: Generator
    limits: HessianLimits

    def residuals(
        self, eigenvalues: Mapping[Scope, GaussNewtonEigenvalues], *, known: float, max_products: int
    ) -> dict[Scope, float]:
        """Bound the norms of blocks of R from above.

        Args:
            eigenvalues: The eigenvalues of P for each scope whose block it is.
            known: A bound that is known already; infinite for none.
            max_products: The largest number of products with each block.
        """
        if known == 0:
            return dict.fromkeys(eigenvalues, 0.0)
        uncertainty = self.model.slope_uncertainty
        judges = {scope: _judge_of_residual(values, known, uncertainty) for scope, values in eigenvalues.items()}
        scales = {
            scope: values.largest if known == float("inf") else max(values.largest, known)
            for scope, values in eigenvalues.items()
        }
        found = self._search(self.model.linear_part, judges, scales, max_products)
        return {scope: known if bound is None else bound for scope, bound in found.items()}

    def largest(
        self,
        eigenvalues: Mapping[Scope, GaussNewtonEigenvalues],
        residuals: Mapping[Scope, float],
        *,
        max_products: int,
    ) -> dict[Scope, float | None]:
        """Find the largest magnitude of an eigenvalue of blocks of H; ``None`` where it is not found to three digits.

        Args:
            eigenvalues: The eigenvalues of P for each scope.
            residuals: An upper bound on the norm of R for each scope.
            max_products: The largest number of products with each block.
        """
        # Elsewhere R moves the largest eigenvalue of P in no digit that counts.
        moved = {scope: own for scope, own in eigenvalues.items() if residuals[scope] > _LARGEST_RTOL * own.largest}
        found = {scope: None if scope in moved else own.largest for scope, own in eigenvalues.items()}
        if max_products < _LEAST_PRODUCTS:
            return found
        judges = {scope: _judge_of_largest(own.second + residuals[scope]) for scope, own in moved.items()}
        scales = {scope: own.largest * max(1.0, self.model.cancellation) for scope, own in moved.items()}
        max_products = min(max_products, _LARGEST_PRODUCTS)
        return found | self._search(self.model, judges, scales, max_products)

    def _search(
        self, model: QuadraticModel, judges: Mapping[Scope, _Judge], scales: Mapping[Scope, float], max_products: int
    ) -> dict[Scope, float | None]:
        """Advance Lanczos iterations of several blocks side by side, until each has what it looks for.

        Args:
            model: The quadratic model of the loss, or its linear part.
            judges: What ends the iteration of each block.
            scales: The size of the terms that a block is made of, of which rounding is a fraction.
            max_products: The largest number of products with each block.
        """
        max_vectors = self.limits.basis_elements // max(1, sum(scope.num_parameters for scope in judges))
        iterations = {
            scope: NormIteration(
                scope.num_parameters,
                generator=self.generator,
                max_products=max(1, min(max_products, max_vectors)),
                like=model.outputs,
                atol=ROUNDING_FACTOR * EPSILON * scales[scope],
            )
            for scope in judges
        }
        operators = {scope: hessian_operator(model, scope.layers) for scope in judges}
        found: dict[Scope, float | None] = {}
        while iterations:
            products = {scope: operators[scope](iteration.vector) for scope, iteration in iterations.items()}
            try:
                bounds = next_bounds(list(iterations.values()), list(products.values()))
            except FloatingPointError:
                for scope, product in products.items():
                    check_finite(product, scope.layers)
                raise
            for scope, bound in zip(products, bounds, strict=True):
                found[scope], is_settled = judges[scope](bound)
                if is_settled or iterations[scope].is_finished:
                    del iterations[scope]
        return found


def _judge_of_residual(eigenvalues: GaussNewtonEigenvalues, known: float, uncertainty: float) -> _Judge:
    """Judge bounds on the norm of a block of R.

    Args:
        eigenvalues: The eigenvalues of P.
        known: A bound that is known already; infinite for none.
        uncertainty: The fraction by which rounding may move the norm.
    """
    smallest = eigenvalues.smallest

    def judge(bound: NormBound) -> tuple[float, bool]:
        residual = min(known, bound.upper * (1 + uncertainty))
        # The norm is at least the value: no product can change a count that is the same for both.
        num_curved = eigenvalues.num_curved(residual)
        num_open = eigenvalues.num_curved(bound.value) - num_curved
        is_hopeless = smallest is None or 2 * bound.value >= smallest
        slack = _HOPELESS_SLACK if is_hopeless and 100 * num_open <= eigenvalues.rank else _SLACK
        if 0 < num_curved == eigenvalues.rank:
            slack = _CERTIFIED_SLACK
        is_tight = residual <= slack * bound.value
        is_settled = is_tight and (num_open == 0 or is_hopeless)
        if known < float("inf"):  # Only the counts matter, and only where the own bound may become the smaller one.
            is_settled |= num_curved == eigenvalues.num_curved(min(known, bound.forecast))
        return residual, is_settled

    return judge


def _judge_of_largest(others: float) -> _Judge:
    r"""Judge Ritz values of a block of H.

    An eigenvalue lies within the residual r of a Ritz value :math:`\theta`. Where all other eigenvalues are at most
    :math:`\mu < \theta` in magnitude, it is the largest, and no further than :math:`r^2 / (\theta - \mu)` (Temple's
    bound; Parlett, 1998, chapter 10). Elsewhere a few products may have found the mean of several eigenvalues.

    Args:
        others: A bound on the other eigenvalues: the second of P, moved by the norm of R.
    """

    def judge(bound: NormBound) -> tuple[float | None, bool]:
        tolerance, gap = _LARGEST_RTOL * bound.value, bound.value - others
        is_near = bound.residual <= tolerance and bound.num_products >= _LEAST_PRODUCTS
        is_proved = bound.upper <= bound.value + tolerance or bound.residual**2 <= tolerance * gap
        is_found = is_near or is_proved
        return (bound.value if is_found else None), is_found

    return judge


def bracket_null_spaces(
    eigenvalues: Mapping[Scope, GaussNewtonEigenvalues], norms: BlockNorms
) -> dict[Scope, NullSpace]:
    """Bracket the nullity of each scope's diagonal block.

    Args:
        eigenvalues: The eigenvalues of P for each scope, the network last.
        norms: The source of bounds on the norms of R and H.

    Raises:
        RuntimeError: If a product is not finite, or the Hessian not symmetric.
    """
    found: dict[Scope, NullSpace] = {}
    *inner, network = eigenvalues
    known = float("inf")
    for scopes, num_products in (([network], NETWORK_PRODUCTS), (inner, LAYER_PRODUCTS)):
        group = {scope: eigenvalues[scope] for scope in scopes}
        max_products = max(1, num_products // max(1, len(group)))
        residuals = norms.residuals(group, known=known, max_products=max_products)
        largest = norms.largest(group, residuals, max_products=max_products)
        found |= {scope: own.bracket(residuals[scope], largest=largest[scope]) for scope, own in group.items()}
        known = residuals.get(network, known)  # A block of R is not larger than R.
    return found
