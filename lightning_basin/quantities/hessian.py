"""Null spaces of the Hessian of the loss, of a network of any size and of each of its scopes."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Generator, Tensor

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.gradients import LayerGradients
from lightning_basin.functional.hessian import hessian_matrix, is_connected
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.lanczos import NormBound, norm_bounds
from lightning_basin.functional.logits import seen_outputs
from lightning_basin.functional.null_space import NullSpace, hessian_null_space, null_space_bracket
from lightning_basin.functional.output_curvature import OutputCurvature
from lightning_basin.functional.rank import EPSILON, Spectrum
from lightning_basin.functional.spectrum import SpectrumAccumulator
from lightning_basin.limits import (
    LAYER_PRODUCTS,
    MAX_DENSE_PARAMETERS,
    MAX_UNPROVED_PARAMETERS,
    NETWORK_PRODUCTS,
    HessianLimits,
)
from lightning_basin.network.layers import Layer
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.network.runs import TracedProbe
from lightning_basin.quantities.hessian_products import HessianProducts, check_finite, num_activations
from lightning_basin.quantities.scopes import Scope
from lightning_basin.settings import HessianMode, behavioral_loss, squared_distance

_SLACK = 2.0  # factor within which the norm of R is bounded
_DENSE_SLACK = 1.01  # the same where products are cheap beside all of H
_LARGEST_PRODUCTS = 30  # for the largest eigenvalue of H
_LARGEST_RTOL = 1e-3  # to which it is known: three digits of a scale
_ROUNDING_FACTOR = 1e3  # by how much rounding may grow on its way into a Hessian
_LEAST_SCALE = 1e-60  # of a loss that is taken as it is
_OTHER_SCALES = (0.3, 0.03)  # of the weights, at which outputs are not saturated
_NUM_COMBINATIONS = 4  # of rows, whose mean square is that of the whole matrix within a factor of some units

_Part = TypeVar("_Part")


class HessianMeasurement(Generic[_Part]):
    """Sees the gradients of each layer go by, and tells the null spaces of the parts of a network afterwards.

    Args:
        traced: The network to differentiate, run on the probe.
        loss_fn: From the outputs to a scalar.
        parts: The layers of each; the last one is the network.
        mode: ``"dense"`` forms the Hessian, ``"bracket"`` bounds its nullity by products with its residual part,
            ``"gauss-newton"`` takes no product, ``"auto"`` brackets and forms it where that is cheap.
        rtol: Relative tolerance on eigenvalues; ``None`` means what the arithmetic allows.
        generator: On the CPU.
        is_plain: Whether the behavior whose spectra are measured is the outputs themselves. For squared errors those
            of the Gauss-Newton part are then the same.
        limits: What may be held at once.

    Attributes:
        notes: What a reader should know.
    """

    def __init__(
        self,
        traced: TracedProbe,
        loss_fn: Callable[[Tensor], Tensor],
        parts: Mapping[_Part, Sequence[Layer]],
        *,
        mode: HessianMode,
        rtol: float | None,
        generator: Generator,
        is_plain: bool,
        limits: "HessianLimits | None" = None,
    ) -> None:
        self.notes: list[str] = []
        self._limits = HessianLimits() if limits is None else limits
        self._chunk_size = self._limits.chunk_size
        network, trace = traced.network, traced.whole
        self._network, self._probe, self._trace = network, traced.probe, trace
        self._parts, self._rtol, self._generator = parts, rtol, generator
        self._seen = seen_outputs(loss_fn, trace.outputs, self._outputs_elsewhere)
        self._scale = _scale_of(self._seen.curvature)
        self._loss_fn = loss_fn if self._scale == 1 else lambda outputs: loss_fn(outputs) / self._scale
        if self._scale != 1:
            self._seen = seen_outputs(self._loss_fn, trace.outputs, self._outputs_elsewhere)
        self._curvature = self._seen.curvature
        self._has_penalty = self._depends_on_parameters(loss_fn(trace.outputs.detach()))
        if self._has_penalty:  # Whatever the outputs do, H is not P.
            self._curvature = replace(self._curvature, residual_is_zero=False)
        self._multiple = self._curvature.multiple if is_plain and self._seen.slope is None else None
        self._takes_products = mode != "gauss-newton"
        self._is_dense = mode == "dense" or (mode == "auto" and _num_parameters(network.layers) <= self._dense_limit)
        # A penalty may meet the outputs in any way: chunks of inputs do not add up.
        is_cut_penalty = self._has_penalty and self._chunk_size is not None
        is_unproved = not self._is_provable and not self._is_dense
        self._is_left_out = is_unproved or is_cut_penalty or self._curvature.is_flat
        self._note_loss()
        self._rows: dict[Layer, Tensor] = {}
        self._square_norms: dict[Layer, float] = {}
        self._curved: dict[str, bool] = {}
        self._spectra: dict[_Part, Spectrum] = {}
        self._accumulators: dict[_Part, SpectrumAccumulator] = {}
        if self._multiple is None:
            self._accumulators = {
                part: SpectrumAccumulator(
                    trace.outputs.numel(),
                    _num_parameters(layers),
                    generator,
                    max_waiting=self._limits.waiting_elements,
                )
                for part, layers in parts.items()
            }

    def _outputs_elsewhere(self) -> list[Tensor]:
        """Of the network at weights that are smaller by different factors; none where it cannot be run there."""
        own = self._network.parameters()
        found = []
        for scale in _OTHER_SCALES:
            with self._network.at([scale * parameter for parameter in own]), torch.no_grad():
                try:
                    found.append(self._network.outputs(self._probe))
                except (TypeError, ValueError):
                    return []
        return found

    def _depends_on_parameters(self, loss: Tensor) -> bool:
        """Whether a loss holds parameters of the network beside the outputs; those of its own do not count."""
        if not loss.requires_grad:
            return False
        return any(is_connected(loss, self._network.parameters()))

    @property
    def _dense_limit(self) -> int:
        return MAX_DENSE_PARAMETERS if self._is_provable else MAX_UNPROVED_PARAMETERS

    @property
    def _is_provable(self) -> bool:
        """Whether the spectrum of P and the slopes of the outputs bracket the Hessian's nullity."""
        return self._curvature.factors is not None and not self._has_penalty

    def _note_loss(self) -> None:
        if self._curvature.is_flat:
            self.notes.append(
                "the loss neither pulls nor curves at the outputs, to the last digit, but does elsewhere: nothing is "
                "known of its Hessian, which is left out"
            )
        elif not self._is_provable:
            why = "is not convex in the outputs" if self._curvature.factors is None else "holds parameters themselves"
            done = "is left out" if self._is_left_out else "is formed"
            how = (
                "which takes a memory_budget that holds all inputs at once"
                if self._has_penalty and self._chunk_size is not None
                else f"'auto' forms it up to {MAX_UNPROVED_PARAMETERS} parameters, hessian='dense' always"
            )
            self.notes.append(f"the loss {why}, so that no products bracket its Hessian's nullity: it {done}; {how}")
        elif not self._curvature.residual_is_zero and not bool(self._curvature.matrices.any()):
            self.notes.append(
                "the loss is piecewise linear in the outputs: its second derivative is zero almost everywhere, and all "
                "that the Hessian holds is residual curvature, which resolves no nullity"
            )

    def resolving_loss(self, null_space: NullSpace) -> float | None:
        """Below about which loss the two ends of a bracket meet; ``None`` where they do, or where it is not known.

        Of a squared error R falls with the residual, and the loss with its square. 0 where that would be below the
        rounding of the outputs.
        """
        is_open = null_space.upper is not None and null_space.lower != null_space.upper
        multiple, smallest = self._curvature.multiple, null_space.smallest or 0.0
        if smallest <= null_space.rtol * (null_space.largest or 0.0):  # The tolerance keeps them apart.
            return None
        if not is_open or multiple is None or not self._is_squared_error or not null_space.residual:
            return None
        loss = self._loss * (smallest / (2 * null_space.residual)) ** 2
        rounding = 0.5 * multiple * float((EPSILON * self._trace.outputs.detach()).square().sum())
        return loss * self._scale if loss > rounding else 0.0

    @property
    def _loss(self) -> float:
        return float(self._loss_fn(self._trace.outputs.detach()).detach())

    @property
    def _is_squared_error(self) -> bool:
        """Whether the loss is a multiple of the sum of squared residuals, which a perfect fit brings to zero."""
        multiple, slope = self._curvature.multiple, self._curvature.slope
        if multiple is None or slope is None:
            return False
        half_square = 0.5 * float(slope.square().sum()) / multiple
        return abs(self._loss - half_square) <= agreement_rtol(self._network.dtype) * half_square

    def add(self, layer: Layer, gradients: LayerGradients) -> None:
        """Take the gradients of the outputs with respect to the next layer into account."""
        if self._is_left_out:
            return
        if self._is_dense and not self._is_exact:
            self._rows[layer] = self._seen.rows(gradients.rows())
        factors = self._curvature.factors
        rows = gradients
        if self._multiple is None:
            blocks = self._curvature.matrices if factors is None else factors
            rows = gradients.weighted(self._seen.of_outputs(blocks))
        if self._curvature.factor_rounding > 0 and self._multiple is None:
            self._square_norms[layer] = self._square_norm(gradients)
        if factors is not None and self._multiple is None:
            for part in [part for part in self._accumulators if layer in self._parts[part]]:
                self._accumulators[part].add(rows)
                if len(self._parts[part]) == 1:  # Complete: judge it now and free its memory.
                    self._spectra[part] = self._accumulators.pop(part).spectrum()
        self._note_curved(layer, rows)

    def _square_norm(self, gradients: LayerGradients) -> float:
        """Sum of all squares, from some random combinations of the rows: each has it as its mean."""
        weights = torch.randn(_NUM_COMBINATIONS, gradients.num_rows, generator=self._generator, dtype=torch.float64)
        combined = [gradients.combination(row) for row in weights.to(self._trace.outputs.device)]
        return float(sum(vector.square().sum() for vector in combined)) / _NUM_COMBINATIONS

    def _resolved(self, part: _Part, spectrum: Spectrum) -> Spectrum:
        """Without what the rounding of the factors leaves, where the gradients all but vanish under them."""
        norm = math.sqrt(sum(self._square_norms.get(layer, 0.0) for layer in self._parts[part]))
        values = spectrum.singular_values
        shape = (self._trace.outputs.numel(), _num_parameters(self._parts[part]))
        noise = max(shape) * self._curvature.factor_rounding * norm
        return replace(spectrum, singular_values=torch.where(values > noise, values, 0.0))

    def _note_curved(self, layer: Layer, rows: LayerGradients) -> None:
        """In which parameters the Gauss-Newton part does not vanish."""
        weights = torch.randn(rows.num_rows, generator=self._generator, dtype=torch.float64)
        combined = rows.combination(weights.to(self._trace.outputs.device))
        for name in layer.parameters:
            size = self._network.named_parameters[name].numel()
            self._curved[name], combined = bool(combined[:size].any()), combined[size:]

    @property
    def _is_exact(self) -> bool:
        """Whether H = P, because no output pulls."""
        return self._curvature.residual_is_zero and self._curvature.factors is not None

    def null_spaces(self, spectra: Mapping[_Part, Spectrum]) -> dict[_Part, NullSpace]:
        """Null spaces of the diagonal block of each part; none where the Hessian is left out.

        Args:
            spectra: Of the behavioral gradients of each part.

        Raises:
            RuntimeError: If the network or the loss cannot be differentiated twice.
        """
        if self._is_left_out:
            return {}
        if self._multiple is None:
            spectra = self._own_spectra()
        found = self._brackets(spectra)
        if self._is_dense and not self._is_exact:
            found = self._dense(found)
        return {part: null_space.scaled(self._scale) for part, null_space in found.items()}

    def _own_spectra(self) -> dict[_Part, Spectrum]:
        """Of the rows whose products are the Gauss-Newton part, where these are not the behavioral gradients."""
        if self._curvature.factors is None:
            return {}
        self._spectra |= {part: accumulator.spectrum() for part, accumulator in self._accumulators.items()}
        self._accumulators.clear()
        return {part: self._resolved(part, spectrum) for part, spectrum in self._spectra.items()}

    def _brackets(self, spectra: Mapping[_Part, Spectrum]) -> dict[_Part, NullSpace]:
        """What products prove; nothing where the loss is not convex in the outputs alone."""
        if self._takes_products:
            products = self._products()
            products.check_differences()
        if not self._is_provable:
            return {}
        if self._is_exact or not self._takes_products:
            residual = 0.0 if self._is_exact else None
            return {part: self._bracket(part, spectra[part], residual) for part in self._parts}
        *parts, whole = self._parts
        found = {whole: self._bounded(whole, spectra[whole], products, float("inf"), NETWORK_PRODUCTS)}
        # A block of R is not larger than R.
        inherited = found[whole].residual or 0.0
        each = max(1, LAYER_PRODUCTS // max(1, len(parts)))
        found |= {part: self._bounded(part, spectra[part], products, inherited, each) for part in parts}
        return {part: found[part] for part in self._parts}

    def _products(self) -> "HessianProducts":
        products = HessianProducts(
            self._network,
            self._probe,
            self._trace,
            self._curvature,
            chunk_size=self._chunk_size,
            link=self._seen.link,
        )
        products.check(self._is_curved)
        return products

    @property
    def _is_curved(self) -> list[bool]:
        return [self._curved[name] for layer in self._network.layers for name in layer.parameters]

    def _bracket(
        self, part: _Part, spectrum: Spectrum, residual: float | None, largest: float | None = None
    ) -> NullSpace:
        num_parameters = _num_parameters(self._parts[part])
        multiple = 1.0 if self._multiple is None else self._multiple
        return null_space_bracket(
            num_parameters, spectrum, residual=residual, multiple=multiple, largest=largest, rtol=self._rtol
        )

    def _bounded(
        self, part: _Part, spectrum: Spectrum, products: "HessianProducts", inherited: float, max_products: int
    ) -> NullSpace:
        """The bracket with the bound on R's block that some products give."""
        layers = self._parts[part]
        steepest = (1.0 if self._multiple is None else self._multiple) * float(spectrum.singular_values.max()) ** 2
        smallest = self._bracket(part, spectrum, None).smallest
        residual = inherited
        if inherited > 0:
            scale = max(steepest, inherited) if inherited < float("inf") else steepest
            for bound in self._bounds(products, layers, scale, max_products, of_residual=True):
                residual = min(inherited, bound.upper * (1 + products.uncertainty))
                slack = _DENSE_SLACK if self._is_dense else _SLACK
                if _is_settled(bound, residual, smallest, slack, is_bounded=inherited < float("inf")):
                    break
        largest: float | None = steepest
        if residual > _LARGEST_RTOL * steepest:
            num_products = min(max_products, _LARGEST_PRODUCTS)
            bounds = list(self._bounds(products, layers, steepest, num_products, of_residual=False))
            largest = bounds[-1].value if bounds[-1].residual <= _LARGEST_RTOL * bounds[-1].value else None
        return self._bracket(part, spectrum, residual, largest)

    def _bounds(
        self,
        products: "HessianProducts",
        layers: Sequence[Layer],
        scale: float,
        max_products: int,
        *,
        of_residual: bool,
    ) -> Iterator[NormBound]:
        num_parameters = _num_parameters(layers)
        for bound in norm_bounds(
            products.operator(layers, of_residual=of_residual),
            num_parameters,
            generator=self._generator,
            max_products=max(1, min(max_products, self._limits.basis_elements // num_parameters)),
            like=self._trace.outputs,
            atol=_ROUNDING_FACTOR * EPSILON * scale * max(1.0, 0.0 if of_residual else products.cancellation),
        ):
            yield bound
            if not of_residual and bound.residual <= _LARGEST_RTOL * bound.value:
                return

    def _dense(self, brackets: Mapping[_Part, NullSpace]) -> dict[_Part, NullSpace]:
        layers = self._network.layers
        gradients = torch.cat([self._rows[layer] for layer in layers], dim=1)
        rounding = _ROUNDING_FACTOR * self._curvature.rounding * float(gradients.square().sum())
        share = 1.0 if self._chunk_size is None else self._chunk_size / self._probe.size
        at_once = max(1, int(share * num_activations(self._trace)))
        batch = max(1, min(64, self._limits.batch_elements // at_once))
        if self._chunk_size is None and not self._curvature.is_closed:
            hessian = hessian_matrix(
                self._loss_fn(self._trace.outputs),
                self._network.parameters(),
                chunk_size=batch,
                atol=rounding,
                curved=self._is_curved,
            )
        else:
            residual = self._products().residual_matrix(chunk_size=batch)
            hessian = residual + gradients.mT @ weighted_rows(gradients, self._curvature.matrices)
        check_finite(hessian, layers)
        positions = torch.arange(hessian.shape[0], device=hessian.device)
        columns = dict(zip(layers, torch.split(positions, [layer.num_parameters for layer in layers]), strict=True))
        null_spaces = {}
        for part, members in self._parts.items():
            chosen = torch.cat([columns[layer] for layer in members])
            null_spaces[part] = hessian_null_space(
                hessian[chosen][:, chosen],
                gradients=gradients[:, chosen],
                curvature=self._curvature,
                rtol=self._rtol,
                bracket=brackets.get(part),
            )
        return null_spaces


def _scale_of(curvature: OutputCurvature) -> float:
    """A power of two that a loss is divided by: 1, unless squares of its derivatives leave the range of float64."""
    largest = float(curvature.matrices.abs().max()) or (0.0 if curvature.slope is None else curvature.slope.abs().max())
    if not largest or _LEAST_SCALE < largest < 1 / _LEAST_SCALE:
        return 1.0
    return 2.0 ** math.frexp(largest)[1]


def _is_settled(bound: NormBound, residual: float, smallest: float | None, slack: float, *, is_bounded: bool) -> bool:
    """Whether further products would change neither what is certified nor, by more than the slack, the bound."""
    is_tight = bound.upper <= slack * bound.value
    is_certified = smallest is not None and 2 * residual < smallest
    is_hopeless = smallest is None or 2 * bound.value >= smallest
    return (is_certified and (is_tight or is_bounded)) or (is_hopeless and is_tight)


def _num_parameters(layers: Sequence[Layer]) -> int:
    return sum(layer.num_parameters for layer in layers)


def hessian_measurement(evaluation: Evaluation, scopes: Sequence[Scope]) -> HessianMeasurement[Scope] | None:
    """Return what will measure the Hessian; ``None`` where there is nothing to look at.

    Args:
        evaluation: The network on the probe.
        scopes: The scopes to report, the network last.
    """
    settings, notes = evaluation.settings, evaluation.notes
    if evaluation.loss_fn is None or settings.hessian is False:
        return None
    if evaluation.network.dtype != torch.float64:
        notes.append("the Hessian is left out: its null space is not resolved by second derivatives in float32")
        return None
    if evaluation.rows.shape[1] < evaluation.trace.outputs[0].numel():
        notes.append("the Hessian is left out: its Gauss-Newton part needs all outputs")
        return None
    loss_fn, targets = evaluation.loss_fn, evaluation.probe.targets
    if loss_fn is behavioral_loss:  # As a function of the outputs it is zero, but its gradient shall change with them.
        loss_fn, targets = squared_distance, evaluation.trace.outputs.detach()
    try:
        measurement = HessianMeasurement(
            evaluation.traced,
            lambda outputs: loss_fn(outputs, targets),
            {scope: scope.layers for scope in scopes},
            mode=settings.hessian,
            rtol=settings.rtol,
            generator=Generator().manual_seed(settings.seed),
            is_plain=not settings.counts_probabilities,
            limits=None if evaluation.plan is None else evaluation.plan.hessian_limits,
        )
    except (RuntimeError, ArithmeticError, ValueError) as error:  # Not every loss can be differentiated twice.
        _leave_out_hessian(error, notes)
        return None
    notes.extend(measurement.notes)
    return measurement


def _leave_out_hessian(error: Exception, notes: list[str]) -> None:
    notes.append(f"the Hessian is left out: {error}")
    warnings.warn(f"the Hessian is left out. {type(error).__name__}: {error}", stacklevel=4)


def measure_null_spaces(
    curvature: HessianMeasurement[Scope] | None, spectra: Mapping[Scope, Spectrum], notes: list[str]
) -> dict[Scope, NullSpace]:
    """Null spaces of the diagonal block of each part; empty where there is no Hessian to look at."""
    if curvature is None:
        return {}
    try:
        return curvature.null_spaces(spectra)
    except (RuntimeError, ArithmeticError, ValueError) as error:  # Not every operation can be differentiated twice.
        _leave_out_hessian(error, notes)
        return {}


def null_space_fields(null_space: NullSpace, hessian: HessianMeasurement[Any]) -> dict[str, Any]:
    """Return what a record says of a null space, by field."""
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
        "hessian_resolving_loss": hessian.resolving_loss(null_space),
        "hessian_rtol": null_space.rtol,
        "hessian_method": null_space.method,
    }
