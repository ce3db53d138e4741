"""The Gauss-Newton part of the Hessian, from the gradients of each layer as they go by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gradients import LayerGradients
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.rank import Spectrum
from lightning_basin.functional.spectrum import SpectrumAccumulator
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.quantities.hessian.loss import LossCurvature
from lightning_basin.quantities.scopes import Scope

_NUM_COMBINATIONS = 4  # random combinations of rows whose mean square is the matrix's, within a small factor


class GaussNewtonAccumulator:
    """Singular values of the rows whose products are the Gauss-Newton part P, scope by scope.

    Gradients of at most ``max_waiting`` elements wait for their sketch.
    """

    def __init__(
        self, network: Network, loss: LossCurvature, scopes: Sequence[Scope], generator: Generator, *, max_waiting: int
    ) -> None:
        self._network, self._loss, self._scopes, self._generator = network, loss, scopes, generator
        self._num_rows = loss.outputs.numel()
        self._square_norms: dict[Layer, float] = {}
        self._curved: dict[Layer, list[Tensor]] = {}
        self._spectra: dict[Scope, Spectrum] = {}
        self._accumulators: dict[Scope, SpectrumAccumulator] = {}
        if loss.gradient_scale is None and loss.is_convex:
            self._accumulators = {
                scope: SpectrumAccumulator(
                    self._num_rows,
                    scope.num_parameters,
                    generator,
                    max_waiting=max_waiting,
                    finds_leading=scope == scopes[-1],
                )
                for scope in scopes
            }

    def add(self, layer: Layer, gradients: LayerGradients) -> None:
        """Take the gradients of the outputs with respect to the next layer into account."""
        curvature, rows = self._loss.curvature, gradients
        if self._loss.gradient_scale is None:
            blocks = curvature.matrices if curvature.factors is None else curvature.factors
            rows = gradients.weighted(self._loss.canonical.blocks_of_outputs(blocks))
            if curvature.factor_rounding > 0:
                self._square_norms[layer] = self._square_norm(gradients)
        for scope in [scope for scope in self._accumulators if layer in scope.layers]:
            self._accumulators[scope].add(rows)
            if len(scope.layers) == 1:  # Complete: judge it now and free its memory.
                self._spectra[scope] = self._accumulators.pop(scope).spectrum()
        weights = torch.randn(rows.num_rows, generator=self._generator, dtype=torch.float64)
        combination = rows.combination(weights.to(self._loss.outputs.device))
        sizes = [self._network.named_parameters[name].numel() for name in layer.parameters]
        self._curved[layer] = [part.any() for part in torch.split(combination, sizes)]

    @property
    def is_curved(self) -> list[bool]:
        """For each parameter of the network whether P does not vanish, as random combinations of its rows show."""
        curved = [part for layer in self._network.layers for part in self._curved[layer]]
        return [bool(part) for part in torch.stack(curved).tolist()]

    def spectra(self, behavioral: Mapping[Scope, Spectrum]) -> Mapping[Scope, Spectrum]:
        """Return singular values of the rows of each scope; none where the loss is not convex.

        Where P is a multiple of GᵀG they are those of the behavioral gradients.
        """
        if self._loss.gradient_scale is not None:
            return behavioral
        self._spectra |= {scope: accumulator.spectrum() for scope, accumulator in self._accumulators.items()}
        self._accumulators.clear()
        return {scope: self._without_noise(scope, spectrum) for scope, spectrum in self._spectra.items()}

    def weights_of_outputs(self, weights: Tensor | None) -> Tensor | None:
        """Return a weighted sum of the rows of P as one of the gradients of the canonical outputs."""
        factors = self._loss.curvature.factors
        if weights is None or self._loss.gradient_scale is not None or factors is None:
            return weights
        return weighted_rows(weights.unsqueeze(1), factors.mT)

    def _square_norm(self, gradients: LayerGradients) -> float:
        """The sum of all squares, from random combinations of the rows: the square of each has it as its mean."""
        weights = torch.randn(_NUM_COMBINATIONS, gradients.num_rows, generator=self._generator, dtype=torch.float64)
        combinations = [gradients.combination(row) for row in weights.to(self._loss.outputs.device)]
        return float(sum(vector.square().sum() for vector in combinations)) / _NUM_COMBINATIONS

    def _without_noise(self, scope: Scope, spectrum: Spectrum) -> Spectrum:
        """The spectrum without singular values below the rounding of the factors, at which gradients all but cancel."""
        norm = math.sqrt(sum(self._square_norms.get(layer, 0.0) for layer in scope.layers))
        values = spectrum.singular_values
        size = max(self._num_rows, scope.num_parameters)
        noise = size * self._loss.curvature.factor_rounding * norm
        return replace(spectrum, singular_values=torch.where(values > noise, values, 0.0))
