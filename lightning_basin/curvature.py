"""How the loss on a probe curves: null spaces of its Hessian, of a network of any size and of each of its parts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import or_
from typing import Generic, Literal, TypeVar

import torch
from torch import Generator, Tensor

from lightning_basin.functional.differences import contradicted, relative_direction
from lightning_basin.functional.hessian import (
    NullSpace,
    check_connected,
    hessian_matrix,
    hessian_null_space,
    hessian_product,
    is_connected,
    null_space_bracket,
)
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.lanczos import NormBound, norm_bounds
from lightning_basin.functional.logits import Link, seen_outputs
from lightning_basin.functional.output_curvature import OutputCurvature
from lightning_basin.functional.rank import EPSILON, Spectrum
from lightning_basin.functional.sketch import LayerGradients, SpectrumAccumulator
from lightning_basin.layers import Layer, Network, Trace, TracedProbe, agreement_rtol
from lightning_basin.probe import Probe

HESSIAN_MODES = ("auto", "dense", "bracket", "gauss-newton")

HessianMode = Literal["auto", "dense", "bracket", "gauss-newton", False]

MAX_DENSE_PARAMETERS = 500
"""Largest number of parameters for which ``hessian="auto"`` also forms the Hessian: some 0.1 s."""

MAX_UNPROVED_PARAMETERS = 3000
"""The same where the loss is not a convex function of the outputs alone, and nothing else is to be had: seconds."""

NETWORK_PRODUCTS = 80
"""At most so many products with R bound its norm; some 30 are enough for a factor of two."""

LAYER_PRODUCTS = 100
"""And so many with the blocks of all layers together; at least one each, which finds those where R is zero."""

_SLACK = 2.0  # factor within which the norm of R is bounded
_DENSE_SLACK = 1.01  # the same where products are cheap beside all of H
_LARGEST_PRODUCTS = 30  # for the largest eigenvalue of H
_LARGEST_RTOL = 1e-3  # to which it is known: three digits of a scale
_GRAPH_ELEMENTS = (
    2**26
)  # float64 numbers in activations whose graph is kept: 512 MiB, some times that with the gradients
_ROUNDING_FACTOR = 1e3  # by how much rounding may grow on its way into a Hessian
_LEAST_SCALE = 1e-60  # of a loss that is taken as it is
_OTHER_SCALES = (0.3, 0.03)  # of the weights, at which outputs are not saturated
_BESIDE = 1e-3  # of their size, by which weights are moved to where nothing is exactly at a kink
_NUM_DIRECTIONS = 3  # along which differences must contradict a derivative: at a kink one may
_NUM_COMBINATIONS = 4  # of rows, whose mean square is that of the whole matrix within a factor of some units

_Part = TypeVar("_Part")


@dataclass(frozen=True, kw_only=True)
class HessianLimits:
    """What may be held at once while a Hessian is measured.

    Attributes:
        chunk_size: Inputs that are differentiated together; ``None`` for all, in whose graph the outputs then are.
        basis_elements: Float64 numbers in the vectors of a Lanczos iteration; 2 GiB.
        batch_elements: And in the activations of one batched backward pass; 256 MiB.
        waiting_elements: And in gradients that wait for their sketch; 512 MiB.
    """

    chunk_size: int | None = None
    basis_elements: int = 2**28
    batch_elements: int = 2**25
    waiting_elements: int = 2**26


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
        at_once = max(1, int(share * _num_activations(self._trace)))
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
        _check_finite(hessian, layers)
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


class HessianProducts:
    r"""Products with the Hessian and with its residual part, by plain double backward.

    At the point where it is taken, the Hessian of the loss is that of its quadratic model in the outputs,
    :math:`\sum_x s_x f_x(\theta) + \frac{1}{2} (f_x(\theta) - f_x)^T A_x (f_x(\theta) - f_x)`, with slope s and
    curvature A held fixed. The first sum alone gives R, without the cancellation of H - P; and both are sums over
    inputs, so that they can be taken in chunks that fit into memory.

    Args:
        network: To differentiate.
        probe: The inputs.
        trace: Of the probe.
        curvature: Of the loss, in all outputs.
        chunk_size: Inputs that are differentiated together, where memory asks for it.
        link: What made the outputs of the logits that the loss is a function of; ``None`` where these are the outputs.
    """

    def __init__(
        self,
        network: Network,
        probe: Probe,
        trace: Trace,
        curvature: OutputCurvature,
        *,
        chunk_size: int | None = None,
        link: Link | None = None,
    ) -> None:
        assert curvature.slope is not None
        self._network, self._probe, self._curvature = network, probe, curvature
        self._parameters, self._link = network.parameters(), link
        self._outputs = self._seen(trace.outputs.detach().reshape(probe.size, -1))
        self._slope = curvature.slope
        num_chunks = max(1, -(-_num_activations(trace) // _GRAPH_ELEMENTS))
        if chunk_size is not None:
            num_chunks = max(num_chunks, -(-probe.size // chunk_size))
        indices = torch.arange(probe.size, device=self._outputs.device)
        self._chunks = indices.tensor_split(min(num_chunks, probe.size))
        self._kept: dict[bool, list[Tensor]] = {}

    def _seen(self, outputs: Tensor) -> Tensor:
        return outputs if self._link is None else self._link.logits(outputs)

    @cached_property
    def uncertainty(self) -> float:
        """By which fraction the rounding of the outputs may move the slope."""
        pulled = EPSILON * weighted_rows(self._outputs.abs().reshape(-1, 1), self._curvature.matrices.abs())
        largest = self._slope.abs().max()  # By which all is divided: squares of small slopes are zero.
        moved, slope = (pulled + self._curvature.rounding) / largest, self._slope / largest
        return float(moved.norm()) / float(slope.norm()) if largest > 0 else 0.0

    @property
    def cancellation(self) -> float:
        """How much larger than the curvature the terms are that cancel in it."""
        scale = float(self._curvature.matrices.abs().max())
        return self._curvature.rounding / (EPSILON * scale) if scale > 0 else 0.0

    def operator(self, layers: Sequence[Layer], *, of_residual: bool) -> Callable[[Tensor], Tensor]:
        """From a direction in the parameters of some layers to the product with their diagonal block."""
        chosen = {name for layer in layers for name in layer.parameters}
        names = [name for layer in self._network.layers for name in layer.parameters]
        indices = [index for index, name in enumerate(names) if name in chosen]
        # Inputs that the loss couples must be seen together, except where all are in one graph anyway.
        is_apart = self._is_coupled and not of_residual and len(self._chunks) > 1

        def product(direction: Tensor) -> Tensor:
            total = self._sum_of_products(indices, direction, of_residual=of_residual or is_apart)
            if is_apart:
                total += self._gauss_newton_product(indices, direction)
            _check_finite(total, layers)
            return total

        return product

    def _sum_of_products(self, indices: Sequence[int], direction: Tensor, *, of_residual: bool) -> Tensor:
        variables = [self._parameters[index] for index in indices]
        total = torch.zeros_like(direction)
        for chunk in self._chunks:
            gradients = self._gradients(chunk, of_residual=of_residual)
            gradient = torch.cat([gradients[index].flatten() for index in indices])
            total += hessian_product(gradient, variables, direction)
        return total

    def residual_matrix(self, *, chunk_size: int) -> Tensor:
        """R itself, shape ``(N, N)``.

        Args:
            chunk_size: Columns per batched backward pass.
        """
        num_parameters = sum(parameter.numel() for parameter in self._parameters)
        total = self._outputs.new_zeros(num_parameters, num_parameters)
        for chunk in self._chunks:
            model = self._model(chunk, of_residual=True)
            if model.requires_grad:  # Some inputs may use no parameter.
                total += hessian_matrix(model, self._parameters, chunk_size=chunk_size)
        return total

    def _gauss_newton_product(self, indices: Sequence[int], direction: Tensor) -> Tensor:
        """GᵀAG times a direction: first how all outputs move, then what pulls them back."""
        variables = [self._parameters[index] for index in indices]
        moved = torch.cat([self._directional_derivative(chunk, variables, direction) for chunk in self._chunks])
        pulled = weighted_rows(moved.reshape(-1, 1), self._curvature.matrices).view(moved.shape)
        total = torch.zeros_like(direction)
        for chunk in self._chunks:
            outputs = self._outputs_of(chunk)
            if outputs.requires_grad:
                parts = torch.autograd.grad(outputs, variables, pulled[chunk], materialize_grads=True)
                total += torch.cat([part.flatten() for part in parts])
        return total

    def _directional_derivative(self, chunk: Tensor, variables: Sequence[Tensor], direction: Tensor) -> Tensor:
        """How the outputs of some inputs move along a direction, as the derivative of a product by its left factor."""
        outputs = self._outputs_of(chunk)
        weights = torch.zeros_like(outputs, requires_grad=True)
        if not outputs.requires_grad:
            return weights.detach()
        parts = torch.autograd.grad(outputs, variables, weights, create_graph=True, materialize_grads=True)
        gradient = torch.cat([part.flatten() for part in parts])
        if not gradient.requires_grad:
            return weights.detach()
        (moved,) = torch.autograd.grad(gradient, weights, direction, materialize_grads=True)
        return moved

    def check_differences(self) -> None:
        """Refuse derivatives that differences contradict: of the outputs, or of the gradients that R is made of.

        They are compared a little beside the weights as they are: a wrong formula is wrong there as well, but hardly a
        rectifier is given an exact zero, where it has no derivative.

        Raises:
            RuntimeError: If along each of some random directions the derivative of an operation is wrong.
        """
        sizes = [layer.num_parameters for layer in self._network.layers]
        wrong: list[int] = []
        for seed in range(_NUM_DIRECTIONS):
            direction = relative_direction(self._parameters, seed=seed)
            beside = _BESIDE * relative_direction(self._parameters, seed=seed + _NUM_DIRECTIONS)
            movement, product = self._derivatives_at(beside, direction)

            def outputs(step: float, beside: Tensor = beside, direction: Tensor = direction) -> list[Tensor]:
                return [self._outputs_at(beside + step * direction)]

            def gradient(step: float, beside: Tensor = beside, direction: Tensor = direction) -> list[Tensor]:
                return list(torch.split(self._gradient_at(beside + step * direction), sizes))

            wrong = contradicted([movement], outputs) or contradicted(torch.split(product, sizes), gradient)
            if not wrong:
                return
        raise RuntimeError(
            f"the derivatives of the module do not agree with differences of its outputs and gradients, in layer "
            f"{self._network.layers[wrong[-1]].name!r} or after it: an operation has a wrong first or second derivative"
        )

    def _derivatives_at(self, shift: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """How the outputs move along a direction, and R times it, at other parameters."""
        moved, total = [], torch.zeros_like(direction)
        with self._network.at(self._moved(shift)):
            for chunk in self._chunks:
                moved.append(self._directional_derivative(chunk, self._parameters, direction))
                gradient = torch.cat([part.flatten() for part in self._gradients_of(chunk, of_residual=True)])
                total += hessian_product(gradient, self._parameters, direction)
        return torch.cat(moved), total

    def _outputs_at(self, shift: Tensor) -> Tensor:
        with self._network.at(self._moved(shift)), torch.no_grad():
            return torch.cat([self._outputs_of(chunk) for chunk in self._chunks])

    def _gradient_at(self, shift: Tensor) -> Tensor:
        """Of the linear part of the quadratic model, at other parameters."""
        total = torch.zeros_like(shift)
        with self._network.at(self._moved(shift)):
            for chunk in self._chunks:
                parts = self._gradients_of(chunk, of_residual=True)
                total += torch.cat([part.detach().flatten() for part in parts])
        return total

    def _moved(self, shift: Tensor) -> list[Tensor]:
        sizes = [parameter.numel() for parameter in self._parameters]
        return [
            parameter.detach().flatten() + part
            for parameter, part in zip(self._parameters, torch.split(shift, sizes), strict=True)
        ]

    def check(self, curved: Sequence[bool]) -> None:
        """Refuse an operation of the network that can be differentiated only once, and does not say so."""
        # An expert, say, may be used by the inputs of some chunks only.
        connected = [False] * len(self._parameters)
        for chunk in self._chunks:
            gradients = self._gradients(chunk, of_residual=False)
            gradient = torch.cat([part.flatten() for part in gradients])
            connected = list(map(or_, connected, is_connected(gradient, self._parameters)))
        check_connected(connected, curved)

    def _gradients(self, chunk: Tensor, *, of_residual: bool) -> list[Tensor]:
        """Gradients of the quadratic model, or of its linear part, on some inputs; kept where they are all."""
        if of_residual in self._kept:
            return self._kept[of_residual]
        gradients = self._gradients_of(chunk, of_residual=of_residual)
        if len(self._chunks) == 1:
            self._kept[of_residual] = gradients
        return gradients

    def _gradients_of(self, chunk: Tensor, *, of_residual: bool) -> list[Tensor]:
        model = self._model(chunk, of_residual=of_residual)
        if not model.requires_grad:
            return [torch.zeros_like(parameter) for parameter in self._parameters]
        return list(torch.autograd.grad(model, self._parameters, create_graph=True, materialize_grads=True))

    def _outputs_of(self, chunk: Tensor) -> Tensor:
        is_whole = len(self._chunks) == 1
        with torch.backends.cudnn.flags(enabled=False):  # Its recurrent layers have no second derivative.
            outputs = self._network.outputs(self._probe if is_whole else self._probe.select(chunk))
        return self._seen(outputs.reshape(len(chunk), -1))

    def _model(self, chunk: Tensor, *, of_residual: bool) -> Tensor:
        """The quadratic model, or its linear part, of some inputs; of inputs that are coupled, as if to these alone."""
        outputs = self._outputs_of(chunk)
        model = (self._slope[chunk] * outputs).sum()
        if of_residual:
            return model
        moved = (outputs - self._outputs[chunk]).reshape(-1, 1)
        return model + 0.5 * (moved * weighted_rows(moved, self._blocks(chunk))).sum()

    @property
    def _is_coupled(self) -> bool:
        return self._curvature.matrices.shape[0] < self._slope.shape[0]

    def _blocks(self, chunk: Tensor) -> Tensor:
        matrices = self._curvature.matrices
        if not self._is_coupled:
            return matrices[chunk]
        rows = torch.arange(self._slope.numel(), device=chunk.device).view(self._slope.shape)[chunk].flatten()
        return matrices[:, rows][:, :, rows]


def _check_finite(rows: Tensor, layers: Sequence[Layer]) -> None:
    """Refuse second derivatives that are not finite, by the layers in whose rows they stand."""
    parts = torch.split(rows, [layer.num_parameters for layer in layers])
    names = [layer.name for layer, part in zip(layers, parts, strict=True) if not bool(part.isfinite().all())]
    if names:
        raise RuntimeError(
            f"second derivatives must be finite, but are NaN or infinite in the layers {names}: keep square roots, "
            f"norms and powers below 2 away from 0"
        )


def _num_parameters(layers: Sequence[Layer]) -> int:
    return sum(layer.num_parameters for layer in layers)


def _num_activations(trace: Trace) -> int:
    return sum(tensor.numel() for left in trace.leaving.values() for tensor in left)
