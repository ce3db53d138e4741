"""Brackets of the Hessian's nullities, from eigenvalues of P and from norms that some products bound."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Generator, Tensor

from lightning_basin.functional.bracket import GaussNewtonEigenvalues, NullSpace
from lightning_basin.functional.lanczos import NormBound, NormIteration, next_bounds
from lightning_basin.functional.rank import EPSILON
from lightning_basin.limits import LAYER_PRODUCTS, NETWORK_PRODUCTS, HessianLimits
from lightning_basin.quantities.hessian.products import ROUNDING_FACTOR, check_finite, pulled_back
from lightning_basin.quantities.hessian.quadratic_model import QuadraticModel
from lightning_basin.quantities.hessian.single_precision import BlockOperator, RoundedModel
from lightning_basin.quantities.scopes import Scope

_SLACK = 2.0  # factor within which the norm of R is bounded
_HOPELESS_SLACK = 4.0  # the same where no bound closes the bracket, nor moves its end by a twentieth of the rank
_DECIDED_SLACK = 10.0  # the same where no product can change a count: the norm is then a point on a logarithmic axis
_NEAREST = 1.9  # multiple of the norm below which a search for a factor of two hardly ends
_LARGEST_PRODUCTS = 30  # most products for the largest eigenvalue of H
_LEAST_PRODUCTS = 8  # fewer hardly ever find it from a random vector
_LEAST_PRODUCTS_NEAR = 5  # nor so few from a vector that is near
_LARGEST_RTOL = 1e-3  # error of the largest eigenvalue of H: it is a scale, of which three digits are enough
_NUM_LOOKED_AT = 2  # blocks of R that are not zero, after which no others are looked at: mostly all are zero, or none
_GAP_SAFETY = 3.0  # factor by which the next eigenvalue may be nearer than the next Ritz value is

_Judge = Callable[[NormBound], bool]
"""From bounds on the norm of a block to a decision on its iteration: whether to end it, or to go on in float32."""


@dataclass(frozen=True, kw_only=True)
class ResidualNorm:
    """What is known of the norm of a block of R.

    Attributes:
        bound: An upper bound.
        estimate: The norm of the network's R within a factor of two; of a layer's block no more than this.
        vector: A vector near the eigenvector of its largest eigenvalue; ``None`` where there was no product.
    """

    bound: float = float("inf")
    estimate: float = float("inf")
    vector: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockNorms:
    """Norms of diagonal blocks of R and H, as Lanczos iterations bound them.

    Attributes:
        leading: The weights of the outputs whose gradient is near the eigenvector of the largest eigenvalue of P, in
            the network; ``None`` where they are not known.
    """

    model: QuadraticModel
    generator: Generator
    limits: HessianLimits
    leading: Tensor | None = None

    @cached_property
    def _rounded(self) -> dict[bool, RoundedModel]:
        """The linear part of the model in float32, and the whole."""
        return {True: RoundedModel(self.model.linear_part), False: RoundedModel(self.model)}

    def residuals(
        self, eigenvalues: Mapping[Scope, GaussNewtonEigenvalues], *, known: ResidualNorm, max_products: int
    ) -> dict[Scope, ResidualNorm]:
        """Bound the norms of blocks of R from above; ``known`` is what is known already of a larger block."""
        if known.bound == 0:
            return dict.fromkeys(eigenvalues, known)
        vanishing = self._vanishing(eigenvalues)
        eigenvalues = {scope: values for scope, values in eigenvalues.items() if scope not in vanishing}
        uncertainty = self.model.slope_uncertainty
        judges = {scope: _judge_of_residual(values, known.bound, uncertainty) for scope, values in eigenvalues.items()}
        is_coarse = {
            scope: lambda bound, values=values: _is_hopeless(values, bound.lower)
            for scope, values in eigenvalues.items()
        }
        scales = {
            scope: values.largest if known.bound == float("inf") else max(values.largest, known.bound)
            for scope, values in eigenvalues.items()
        }
        found = self._search(self.model.linear_part, judges, scales, max_products, is_coarse)
        return vanishing | {scope: _residual_norm(*found[scope], known, uncertainty) for scope in eigenvalues}

    def _vanishing(self, scopes: Iterable[Scope]) -> dict[Scope, ResidualNorm]:
        """The norms of those blocks of R that are zero, where this can be seen in float32."""
        norms: dict[Scope, ResidualNorm] = {}
        num_others = 0
        for scope in scopes:
            norm = self._rounded[True].vanishing_norm(scope.layers)
            if norm is not None:
                norms[scope] = ResidualNorm(bound=norm, estimate=norm)
            else:
                num_others += 1
            if num_others == _NUM_LOOKED_AT:
                break
        return norms

    def largest(
        self,
        eigenvalues: Mapping[Scope, GaussNewtonEigenvalues],
        residuals: Mapping[Scope, ResidualNorm],
        *,
        max_products: int,
    ) -> dict[Scope, float | None]:
        """Find the largest magnitude of an eigenvalue of blocks of H to three digits; ``None`` where this fails."""
        # Elsewhere R moves the largest eigenvalue of P in no digit that counts.
        moved = {
            scope: own for scope, own in eigenvalues.items() if residuals[scope].bound > _LARGEST_RTOL * own.largest
        }
        largest = {scope: None if scope in moved else own.largest for scope, own in eigenvalues.items()}
        if max_products < _LEAST_PRODUCTS:
            return largest
        near = {scope: self._start(scope, own, residuals[scope]) for scope, own in moved.items()}
        judges = {
            scope: _judge_of_largest(own.second + residuals[scope].bound, is_near=near[scope] is not None)
            for scope, own in moved.items()
        }
        scales = {scope: own.largest * max(1.0, self.model.cancellation) for scope, own in moved.items()}
        is_coarse = {
            scope: lambda _, scope=scope: _is_hopeless(eigenvalues[scope], residuals[scope].bound) for scope in moved
        }
        max_products = min(max_products, _LARGEST_PRODUCTS)
        found = self._search(self.model, judges, scales, max_products, is_coarse, near=near)
        return largest | {scope: bound.value if judges[scope](bound) else None for scope, (bound, _) in found.items()}

    def _start(self, scope: Scope, eigenvalues: GaussNewtonEigenvalues, residual: ResidualNorm) -> Tensor | None:
        """A vector near the eigenvectors of the largest eigenvalues of P and R, of which H is the sum."""
        parameters = self.model.parameters
        is_network = scope.num_parameters == sum(parameter.numel() for parameter in parameters)
        if self.leading is None or residual.vector is None or not is_network:
            return None
        of_curvature = pulled_back(self.model, parameters, self.leading)
        norm = residual.estimate / _SLACK
        share = norm / max(eigenvalues.largest, norm)
        start: Tensor = of_curvature / of_curvature.norm() + share * residual.vector
        return start

    def _search(
        self,
        model: QuadraticModel,
        judges: Mapping[Scope, _Judge],
        scales: Mapping[Scope, float],
        max_products: int,
        is_coarse: Mapping[Scope, _Judge],
        *,
        near: Mapping[Scope, Tensor | None] | None = None,
    ) -> dict[Scope, tuple[NormBound, Tensor]]:
        """Advance Lanczos iterations of several blocks side by side, until each has what it looks for.

        For each block, ``judges`` say what ends the iteration, and ``is_coarse`` whether float32 has the digits that
        are looked for. ``scales`` are the sizes of the terms that a block is made of, of which rounding is a fraction;
        ``near`` are vectors near the eigenvectors. Return the last bounds for each block, and the Ritz vector.
        """
        max_vectors = self.limits.basis_elements // max(1, sum(scope.num_parameters for scope in judges))
        iterations = {
            scope: NormIteration(
                scope.num_parameters,
                generator=self.generator,
                max_products=max(1, min(max_products, max_vectors)),
                like=model.outputs,
                atol=ROUNDING_FACTOR * EPSILON * scales[scope],
                near=near[scope] if near else None,
            )
            for scope in judges
        }
        operators = {scope: BlockOperator(self._rounded[model.is_linear], scope.layers) for scope in judges}
        found: dict[Scope, tuple[NormBound, Tensor]] = {}
        while iterations:
            products = {scope: operators[scope](iteration.vector) for scope, iteration in iterations.items()}
            try:
                bounds = next_bounds(list(iterations.values()), list(products.values()))
            except FloatingPointError:
                for scope, product in products.items():
                    check_finite(product, scope.layers)
                raise
            for scope, bound in zip(products, bounds, strict=True):
                if judges[scope](bound) or iterations[scope].is_finished:
                    found[scope] = bound, iterations.pop(scope).ritz_vector()
                elif is_coarse[scope](bound):
                    iterations[scope].accept_noise(operators[scope].round_products())
        return found


def _is_hopeless(eigenvalues: GaussNewtonEigenvalues, residual: float) -> bool:
    """Whether a norm of R is so large that no bound on it closes the bracket: only its size is of interest then."""
    return eigenvalues.smallest is None or 2 * residual >= eigenvalues.smallest


def _judge_of_residual(eigenvalues: GaussNewtonEigenvalues, known: float, uncertainty: float) -> _Judge:
    """Judge bounds on the norm of a block of R, which rounding may move by the fraction ``uncertainty``."""

    def judge(bound: NormBound) -> bool:
        residual = min(known, bound.upper * (1 + uncertainty))
        # The norm is at least the lower bound: no product can change a count that is the same for both.
        num_curved = eigenvalues.num_curved(residual)
        num_open = eigenvalues.num_curved(bound.lower) - num_curved
        is_hopeless = _is_hopeless(eigenvalues, bound.lower)
        slack = _HOPELESS_SLACK if is_hopeless and 20 * num_open <= eigenvalues.rank else _SLACK
        # A bound within a factor of two would count no eigenvalue, nor one of a layer's block: these are no larger.
        counts_none = is_hopeless and eigenvalues.num_curved(_NEAREST * bound.lower) == 0
        counts_all = num_open == 0 and num_curved == eigenvalues.rank
        if eigenvalues.rank > 0 and (counts_none or counts_all):
            slack = _DECIDED_SLACK
        is_tight = residual <= slack * bound.lower
        is_settled = is_tight and (num_open == 0 or is_hopeless)
        if known < float("inf"):  # Only the counts matter, and only where the own bound may become the smaller one.
            is_settled |= num_curved == eigenvalues.num_curved(min(known, bound.forecast))
        return is_settled

    return judge


def _residual_norm(bound: NormBound, vector: Tensor, known: ResidualNorm, uncertainty: float) -> ResidualNorm:
    """What the last bounds on the norm of a block of R say of it, beside what is known of a larger block."""
    upper = bound.upper * (1 + uncertainty)
    estimate = min(upper, _SLACK * bound.lower) if known.vector is None else upper
    return ResidualNorm(bound=min(known.bound, upper), estimate=min(known.estimate, estimate), vector=vector)


def _judge_of_largest(others: float, *, is_near: bool) -> _Judge:
    r"""Judge Ritz values of a block of H.

    An eigenvalue lies within the residual r of a Ritz value :math:`\theta`. Where all other eigenvalues are at most
    :math:`\mu < \theta` in magnitude, it is the largest, and no further than :math:`r^2 / (\theta - \mu)` (Temple's
    bound; Parlett, 1998, chapter 10). Elsewhere the other Ritz values stand for the other eigenvalues, after so many
    products that these have hardly found the mean of several eigenvalues, and where none of them may become the
    largest.
    """
    least_products = _LEAST_PRODUCTS_NEAR if is_near else _LEAST_PRODUCTS

    def judge(bound: NormBound) -> bool:
        tolerance = _LARGEST_RTOL * bound.value
        error = min(bound.residual, _GAP_SAFETY * bound.residual**2 / bound.gap if bound.gap > 0 else float("inf"))
        is_alone = bound.rival <= bound.value + tolerance
        is_converged = error <= tolerance and is_alone and bound.num_products >= least_products
        is_proved = bound.upper <= bound.value + tolerance or bound.residual**2 <= tolerance * (bound.value - others)
        return is_converged or is_proved

    return judge


def bracket_null_spaces(
    eigenvalues: Mapping[Scope, GaussNewtonEigenvalues], norms: BlockNorms
) -> dict[Scope, NullSpace]:
    """Bracket the nullity of each scope's diagonal block, by the eigenvalues of P for each scope, the network last."""
    found: dict[Scope, NullSpace] = {}
    *inner, network = eigenvalues
    known = ResidualNorm()
    for scopes, num_products in (([network], NETWORK_PRODUCTS), (inner, LAYER_PRODUCTS)):
        group = {scope: eigenvalues[scope] for scope in scopes}
        max_products = max(1, num_products // max(1, len(group)))
        residuals = norms.residuals(group, known=known, max_products=max_products)
        largest = norms.largest(group, residuals, max_products=max_products)
        found |= {
            scope: own.bracket(residuals[scope].bound, estimate=residuals[scope].estimate, largest=largest[scope])
            for scope, own in group.items()
        }
        known = residuals.get(network, known)  # A block of R is not larger than R.
    return found
