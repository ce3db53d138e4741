"""Null spaces of the Hessian of the loss, for a network of any size and for each of its scopes."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.bracket import GaussNewtonEigenvalues, NullSpace, gauss_newton_eigenvalues
from lightning_basin.functional.gradients import LayerGradients
from lightning_basin.functional.rank import Spectrum
from lightning_basin.limits import HessianLimits
from lightning_basin.network.layers import Layer
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.quantities.hessian.brackets import BlockNorms, bracket_null_spaces
from lightning_basin.quantities.hessian.dense import dense_brackets, dense_hessian, dense_null_spaces
from lightning_basin.quantities.hessian.derivative_check import check_derivatives, check_twice_differentiable
from lightning_basin.quantities.hessian.gauss_newton import GaussNewtonAccumulator
from lightning_basin.quantities.hessian.loss import LossCurvature, loss_curvature
from lightning_basin.quantities.hessian.quadratic_model import QuadraticModel, quadratic_model
from lightning_basin.quantities.hessian.route import HessianRoute, hessian_route
from lightning_basin.quantities.scopes import Scope
from lightning_basin.settings import behavioral_loss, squared_distance

_DERIVATIVES = "derivatives"
"""The check that the derivatives of a module are those of its outputs."""


class HessianMeasurement:
    """Sees the gradients of each layer go by, and finds the null spaces of all scopes afterwards.

    The network is the last of ``scopes``. Checks of derivatives that hold for the structure of the module are added to
    ``passed_checks``.
    """

    def __init__(
        self,
        runs: ProbeRuns,
        loss: LossCurvature,
        route: HessianRoute,
        scopes: Sequence[Scope],
        *,
        rtol: float | None,
        generator: Generator,
        limits: HessianLimits,
        passed_checks: set[str],
    ) -> None:
        self._runs, self._loss, self._route, self._scopes = runs, loss, route, scopes
        self._rtol, self._generator, self._limits = rtol, generator, limits
        self._passed_checks = passed_checks
        self._forms_hessian = route.is_dense and not loss.is_exact
        self._gradients: dict[Layer, Tensor] = {}
        self._gauss_newton = GaussNewtonAccumulator(
            runs.network, loss, scopes, generator, max_waiting=limits.waiting_elements
        )

    @property
    def needs_leading(self) -> bool:
        """Whether the leading left singular vector of the network's behavioral gradients is of use."""
        takes_products = self._route.takes_products and not (self._route.is_dense or self._loss.is_exact)
        return takes_products and self._loss.gradient_scale is not None

    def add(self, layer: Layer, gradients: LayerGradients) -> None:
        """Take the gradients of the outputs with respect to the next layer into account."""
        if self._forms_hessian:
            self._gradients[layer] = self._loss.canonical.gradients(gradients.rows())
        self._gauss_newton.add(layer, gradients)

    def null_spaces(self, spectra: Mapping[Scope, Spectrum]) -> dict[Scope, NullSpace]:
        """Find the null space of each scope's diagonal block; none where nothing is known of it.

        ``spectra`` are those of the behavioral gradients of each scope.
        """
        model, eigenvalues, leading = None, {}, None
        # Where H = P no second derivative of the network is taken, so that none can be wrong or missing.
        if self._route.takes_products and not self._loss.is_exact:
            model = self._checked_model()
        if self._loss.is_provable:
            spectra = self._gauss_newton.spectra(spectra)
            eigenvalues = self._eigenvalues(spectra)
            leading = self._gauss_newton.weights_of_outputs(spectra[self._scopes[-1]].leading)
        if self._loss.is_exact or model is None:
            residual = 0.0 if self._loss.is_exact else None
            null_spaces = {scope: own.bracket(residual) for scope, own in eigenvalues.items()}
        elif self._route.is_dense:
            null_spaces = self._dense(model, eigenvalues)
        else:
            norms = BlockNorms(model=model, generator=self._generator, limits=self._limits, leading=leading)
            null_spaces = bracket_null_spaces(eigenvalues, norms)
        return {scope: self._loss.rescaled(null_space) for scope, null_space in null_spaces.items()}

    def _eigenvalues(self, spectra: Mapping[Scope, Spectrum]) -> dict[Scope, GaussNewtonEigenvalues]:
        """The eigenvalues of the Gauss-Newton part for each scope."""
        scale = self._loss.gradient_scale or 1.0
        return {
            scope: gauss_newton_eigenvalues(scope.num_parameters, spectra[scope], scale=scale, rtol=self._rtol)
            for scope in self._scopes
        }

    def _checked_model(self) -> QuadraticModel:
        """The quadratic model of the loss, after a check of its derivatives."""
        loss, chunk_size = self._loss, self._limits.chunk_size
        model = quadratic_model(self._runs, loss.curvature, link=loss.canonical.link, chunk_size=chunk_size)
        if _DERIVATIVES not in self._passed_checks:
            is_curved = self._gauss_newton.is_curved
            check_twice_differentiable(model, is_curved)
            check_derivatives(model)
            if all(is_curved):  # Behind weights of zero, wrong derivatives would not have shown.
                self._passed_checks.add(_DERIVATIVES)
        return model

    def _dense(
        self, model: QuadraticModel, eigenvalues: Mapping[Scope, GaussNewtonEigenvalues]
    ) -> dict[Scope, NullSpace]:
        """Null spaces of all of H, and brackets by all of R where these prove something."""
        gradients = torch.cat([self._gradients[layer] for layer in self._runs.network.layers], dim=1)
        hessian, residual = dense_hessian(self._runs, model, gradients, self._loss, self._limits)
        brackets: dict[Scope, NullSpace] = {}
        if eigenvalues and residual is not None:
            brackets = dense_brackets(residual, eigenvalues, uncertainty=model.slope_uncertainty)
        del residual  # As large as the Hessian.
        return dense_null_spaces(hessian, gradients, self._loss, self._scopes, brackets, rtol=self._rtol)


def hessian_measurement(evaluation: Evaluation, scopes: Sequence[Scope]) -> HessianMeasurement | None:
    """Return the measurement of the Hessian, before it has seen gradients; ``None`` where the Hessian is left out."""
    settings, runs, notes = evaluation.settings, evaluation.runs, evaluation.notes
    if evaluation.loss_fn is None or settings.hessian is False:
        return None
    if evaluation.network.dtype != torch.float64:
        notes.append("the Hessian is left out: its null space is not resolved by second derivatives in float32")
        return None
    if evaluation.rows.shape[1] < evaluation.trace.outputs[0].numel():
        notes.append("the Hessian is left out: its Gauss-Newton part needs all outputs")
        return None
    loss_fn, targets = evaluation.loss_fn, evaluation.probe.targets
    if loss_fn is behavioral_loss:  # It is zero at all outputs, but its gradient shall change with them.
        loss_fn, targets = squared_distance, evaluation.trace.outputs.detach()
    try:
        loss = loss_curvature(
            lambda outputs: loss_fn(outputs, targets), runs, behavior_is_outputs=not settings.counts_probabilities
        )
    except (RuntimeError, ArithmeticError, ValueError) as error:  # Not every loss can be differentiated twice.
        _leave_out_hessian(error, notes)
        return None
    plan = evaluation.plan
    limits = HessianLimits() if plan is None or plan.hessian_limits is None else plan.hessian_limits
    has_chunks = limits.chunk_size is not None
    route = hessian_route(settings.hessian, loss, num_parameters=scopes[-1].num_parameters, has_chunks=has_chunks)
    if route.note is not None:
        notes.append(route.note)
    if route.is_left_out:
        return None
    generator = Generator().manual_seed(settings.seed)
    return HessianMeasurement(
        runs,
        loss,
        route,
        scopes,
        rtol=settings.rtol,
        generator=generator,
        limits=limits,
        passed_checks=evaluation.passed_checks,
    )


def measure_null_spaces(
    hessian: HessianMeasurement | None, spectra: Mapping[Scope, Spectrum], notes: list[str]
) -> dict[Scope, NullSpace]:
    """Find the null space of each scope's diagonal block; none where there is no Hessian to look at.

    The Hessian of a network that cannot be differentiated twice is left out, with a note and a warning.
    """
    if hessian is None:
        return {}
    try:
        return hessian.null_spaces(spectra)
    except (RuntimeError, ArithmeticError, ValueError) as error:  # Not every operation can be differentiated twice.
        _leave_out_hessian(error, notes)
        return {}


def _leave_out_hessian(error: Exception, notes: list[str]) -> None:
    notes.append(f"the Hessian is left out: {error}")
    warnings.warn(f"the Hessian is left out. {type(error).__name__}: {error}", stacklevel=5)


def null_space_fields(null_space: NullSpace) -> dict[str, Any]:
    """Return the record's fields of a null space."""
    return {
        "hessian_nullity": null_space.nullity,
        "hessian_nullity_lower": null_space.lower,
        "hessian_nullity_upper": null_space.upper,
        "hessian_nullity_strict": null_space.strict,
        "hessian_negative": null_space.negative,
        "hessian_largest": null_space.largest,
        "residual_curvature": null_space.residual_curvature,
        "smallest_curvature": null_space.smallest_curvature,
        "gauss_newton_nullity": null_space.gauss_newton_nullity,
        "hessian_resolving_loss": null_space.resolving_loss,
        "hessian_rtol": null_space.rtol,
        "hessian_method": null_space.method,
    }
