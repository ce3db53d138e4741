"""Ranks of the behavioral gradients of layers, blocks and the network."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.certificates import (
    IndependentRows,
    certified_rank,
    independent_rows,
    rows_independent_in_few_columns,
)
from lightning_basin.functional.duplicates import duplicated_activations
from lightning_basin.functional.gradients import LayerGradients, gram_of
from lightning_basin.functional.gram import GramMatrix
from lightning_basin.functional.rank import (
    EPSILON,
    GradientRank,
    Spectrum,
    count_by_magnitude,
    gradient_rank,
    log_det_gram,
    resolved_tolerances,
)
from lightning_basin.functional.spectrum import SpectrumAccumulator
from lightning_basin.gradients.check import AutogradCheck
from lightning_basin.gradients.layers import layer_gradients
from lightning_basin.limits import GROUP_ELEMENTS
from lightning_basin.network.layers import Layer
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.quantities.behavior import behavior_jacobian
from lightning_basin.quantities.hessian.measurement import HessianMeasurement
from lightning_basin.quantities.scopes import Scope
from lightning_basin.stages import StageClock
from lightning_basin.tensors import as_result

_NUM_TRIED = 2  # layers, from the last, whose gradients may show that all rows of the network are independent


class RankMeasurement:
    """Ranks of scopes, whose gradients are added layer by layer.

    Where no spectra are needed, a rank may be proved without them: of gradients of the outputs, which the check knows.
    """

    def __init__(
        self,
        scopes: Sequence[Scope],
        runs: ProbeRuns,
        check: AutogradCheck,
        *,
        rtol: float | None,
        generator: Generator,
        max_waiting: int,
        needs_spectra: bool,
        behavior_is_outputs: bool,
        finds_leading: bool = False,
    ) -> None:
        self._scopes, self._runs, self._check = scopes, runs, check
        self._rtol, self._generator, self._needs_spectra = rtol, generator, needs_spectra
        self._epsilon = torch.finfo(runs.network.dtype).eps
        self._ranks: dict[Scope, GradientRank] = {}
        self._spectra: dict[Scope, Spectrum] = {}
        self._open = {
            scope: SpectrumAccumulator(
                check.num_rows,
                scope.num_parameters,
                generator,
                max_waiting=max_waiting,
                epsilon=self._epsilon,
                finds_leading=finds_leading and scope == scopes[-1],
            )
            for scope in scopes
        }
        self._dependent: set[Scope] = set()  # Scopes whose Gram matrix has been tried in vain.
        # The check knows the norm of the outputs' gradients alone; and inputs with equal outputs are often merged ones.
        self._may_be_independent = not needs_spectra and behavior_is_outputs and _are_distinct(runs.full_trace.outputs)
        # In float32 the Gram matrix decides: what it does not resolve is rounding.
        self._needs_grams = needs_spectra or self._may_be_independent or self._epsilon > EPSILON

    @property
    def is_complete(self) -> bool:
        """Whether all ranks are known."""
        return not self._open

    def first_layers(self) -> list[Layer]:
        """The layers to look at before all others, as they may prove the rank of the network, too; none for all."""
        *asked, network = self._scopes
        layers = {layer for scope in asked for layer in scope.layers}
        is_whole = layers.issuperset(network.layers) or not self._large([network])
        return [] if is_whole else [layer for layer in network.layers if layer in layers]

    def close(self, layers: Sequence[Layer]) -> None:
        """Judge the blocks of some layers, of which all have been added."""
        for scope in [scope for scope in self._open if scope.kind == "block" and set(layers).issuperset(scope.layers)]:
            self._judge(scope)

    def try_last_layers(self, *, max_elements: int, clock: StageClock, layers: Sequence[Layer] | None = None) -> None:
        """Look first at the last large layers, whose backward passes are short: they may prove the network's rank."""
        if not self._large(self._open) or any(scope.kind != "network" for scope in self._open):
            return
        layers = self._runs.network.layers if layers is None else layers
        large = [layer for layer in layers if layer.num_parameters >= self._check.num_rows and self._multiplies(layer)]
        for layer in large[: -_NUM_TRIED - 1 : -1]:
            gradients = layer_gradients(self._runs, self._check, layers=[layer], max_elements=max_elements)
            for measured in clock.each("gradients", gradients):
                self._try_few_columns(self._open, measured.gradients)
            if self.is_complete:
                return

    def add(self, layer: Layer, gradients: LayerGradients) -> None:
        """Take the gradients with respect to the next layer into account."""
        if self._epsilon == EPSILON:  # At the tolerances of float32 few columns of one layer hardly ever decide.
            self._try_few_columns(self._open_with(layer), gradients)
        scopes = self._open_with(layer)
        gram = cache(partial(gram_of, gradients)) if self._needs_grams and len(scopes) > 1 else None
        if gram is not None:
            self._try_all_columns(scopes, gradients, gram)
            scopes = self._open_with(layer)
        for scope in scopes:
            self._open[scope].add(gradients, gram)
        for scope in scopes:
            if scope.kind == "layer":  # Complete: judge it now and free its memory.
                self._judge(scope)

    def results(self) -> tuple[dict[Scope, GradientRank], dict[Scope, Spectrum]]:
        """Return the ranks of all scopes, and the singular values where the rank was not proved without them."""
        for scope in list(self._open):
            self._judge(scope)
        return {scope: self._ranks[scope] for scope in self._scopes}, self._spectra

    def _multiplies(self, layer: Layer) -> bool:
        """Whether a layer has a matrix: vectors, as of a normalization, are too few columns to look at some of them."""
        return any(parameter.ndim > 1 for parameter in self._runs.network.parameters([layer]))

    def _open_with(self, layer: Layer) -> list[Scope]:
        """The scopes with a layer whose rank is not known yet."""
        return [scope for scope in self._open if layer in scope.layers]

    def _large(self, scopes: Iterable[Scope]) -> list[Scope]:
        """The scopes for which a proof of independent rows costs less than singular values."""
        return [scope for scope in scopes if not self._open[scope].is_tiny] if self._may_be_independent else []

    def _try_few_columns(self, scopes: Iterable[Scope], gradients: LayerGradients) -> None:
        """Conclude scopes: rows that are independent in some columns are so in every scope that has these."""
        if large := self._large(scopes):
            self._conclude(large, rows_independent_in_few_columns(gradients, self._generator))

    def _try_all_columns(
        self, scopes: Iterable[Scope], gradients: LayerGradients, gram: Callable[[], GramMatrix]
    ) -> None:
        """Conclude the scope of a layer by all of its columns, and with it the block and the network around it."""
        large = self._large(scopes) if gradients.num_columns >= gradients.num_rows else []
        if large:
            rows = independent_rows(gram(), resolution=max(self._rtol_of(scope) for scope in large))
            complete = [scope for scope in large if scope.kind == "layer"]
            self._conclude(large, rows, complete=complete)
            self._dependent |= self._open.keys() & set(complete)

    def _conclude(
        self, scopes: Iterable[Scope], rows: IndependentRows | None, *, complete: Sequence[Scope] = ()
    ) -> None:
        """Take the rank of scopes from rows with some of their columns, or with all columns of the complete ones."""
        if rows is None:
            return
        for scope in scopes:
            norm = None if scope in complete else self._check.norm(scope.layers)
            if rank := rows.rank(rtol=self._rtol_of(scope), epsilon=self._epsilon, norm=norm):
                resolved = resolved_tolerances(self._open.pop(scope).default_rtol, self._epsilon)
                self._ranks[scope] = replace(rank, at={rtol: rank.at[rtol] for rtol in resolved if rtol in rank.at})

    def _rtol_of(self, scope: Scope) -> float:
        return self._open[scope].default_rtol if self._rtol is None else self._rtol

    def _judge(self, scope: Scope) -> None:
        accumulator = self._open.pop(scope)
        matrices = accumulator.matrices()
        rank = None
        if not self._needs_spectra and not accumulator.is_tiny and matrices is not None:
            rank = certified_rank(
                matrices,
                self._generator,
                default_rtol=accumulator.default_rtol,
                rtol=self._rtol,
                epsilon=self._epsilon,
                gram=accumulator.gram() if self._needs_grams and scope not in self._dependent else None,
            )
        if rank is None:
            self._spectra[scope] = accumulator.spectrum()
            rank = gradient_rank(self._spectra[scope], rtol=self._rtol)
        self._ranks[scope] = rank


def _are_distinct(outputs: Tensor) -> bool:
    """Whether no two inputs have equal outputs."""
    return duplicated_activations(as_result(outputs), rtol=0.0) == 0


def measure_ranks(
    evaluation: Evaluation, scopes: Sequence[Scope], hessian: HessianMeasurement | None, generator: Generator
) -> tuple[dict[Scope, GradientRank], dict[Scope, Spectrum]]:
    """Find the ranks of each scope, and known spectra; the Hessian is shown the gradients of outputs on the way."""
    settings, jacobian, clock = evaluation.settings, behavior_jacobian(evaluation), evaluation.clock
    with clock("gradients"):
        check = AutogradCheck(evaluation.runs, generator)
    measurement = RankMeasurement(
        scopes,
        evaluation.runs,
        check,
        rtol=settings.rtol,
        generator=generator,
        max_waiting=min(GROUP_ELEMENTS, evaluation.max_elements) // 2,
        needs_spectra=settings.spectrum or hessian is not None,
        behavior_is_outputs=jacobian is None,
        finds_leading=hessian is not None and hessian.needs_leading,
    )
    first = measurement.first_layers()
    others = [layer for layer in evaluation.network.layers if layer not in first]
    _add_layers(evaluation, measurement, check, first, jacobian, hessian)
    measurement.close(first)
    measurement.try_last_layers(max_elements=evaluation.max_elements, clock=clock, layers=others)
    _add_layers(evaluation, measurement, check, others, jacobian, hessian)
    return measurement.results()


def _add_layers(
    evaluation: Evaluation,
    measurement: RankMeasurement,
    check: AutogradCheck,
    layers: Sequence[Layer],
    jacobian: Tensor | None,
    hessian: HessianMeasurement | None,
) -> None:
    """Add the gradients of some layers until all ranks are known."""
    if measurement.is_complete:
        return
    gradients = layer_gradients(evaluation.runs, check, layers=layers, max_elements=evaluation.max_elements)
    for measured in evaluation.clock.each("gradients", gradients, num_items=len(layers)):
        measurement.add(
            measured.layer, measured.gradients if jacobian is None else measured.gradients.weighted(jacobian)
        )
        if hessian is not None:
            with evaluation.clock("hessian"):
                hessian.add(measured.layer, measured.gradients)
        if measured.note is not None:
            evaluation.notes.append(measured.note)
        if measurement.is_complete and hessian is None:
            return


def rank_fields(rank: GradientRank, spectrum: Spectrum | None) -> dict[str, Any]:
    """Return what a record says of a rank, by field; there is no spectrum where the rank was proved without it."""
    if spectrum is None:
        of_spectrum: dict[str, Any] = {}
    else:
        values = spectrum.singular_values
        of_spectrum = {
            "log_det_gram": log_det_gram(values, rank.rank),
            "gradient_largest": rank.largest,
            "gradient_spectrum": count_by_magnitude(values, rtol=spectrum.rtol),
        }
    return of_spectrum | {
        "gradient_rank": rank.rank,
        "gradient_rank_gap": rank.gap,
        "gradient_rank_at": rank.at,
        "gradient_effective_rank": rank.effective_rank,
        "gradient_rtol": rank.rtol,
        "gradient_method": rank.method,
    }
