"""Ranks of the behavioral gradients of layers, blocks and the network, each by the cheapest proof that decides."""

from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.certificates import OVERSAMPLING, IndependentRows, independent_rows
from lightning_basin.functional.gradients import LayerGradients, gram_of
from lightning_basin.functional.gram import GramMatrix
from lightning_basin.functional.rank import EPSILON, GradientRank, Spectrum, gradient_rank, log_det_gram
from lightning_basin.functional.softmax import softmax_jacobian
from lightning_basin.functional.spectrum import SpectrumAccumulator, rows_independent_in_few_columns
from lightning_basin.gradients.check import AutogradCheck
from lightning_basin.gradients.layers import layer_gradients
from lightning_basin.limits import GROUP_ELEMENTS
from lightning_basin.network.layers import Layer
from lightning_basin.network.runs import TracedProbe
from lightning_basin.quantities.hessian.measurement import HessianMeasurement
from lightning_basin.quantities.scopes import Scope

_NUM_TRIED = 2  # layers, whose gradients may show that those of the network are independent


class RankMeasurement:
    """Ranks of parts of a network, whose gradients are added layer by layer.

    Args:
        parts: To judge.
        traced: The network on the probe.
        check: Of the gradients of the outputs.
        rtol: Relative tolerance of ranks; ``None`` means that of what is decomposed.
        generator: On the CPU; for random vectors.
        max_waiting: Numbers that may be held of gradients that are not judged yet.
        needs_spectra: Whether singular values are wanted, also where the rank can be proved without.
        is_plain: Whether it is the gradients of the outputs that are added.
    """

    def __init__(
        self,
        parts: Sequence[Scope],
        traced: TracedProbe,
        check: AutogradCheck,
        *,
        rtol: float | None,
        generator: Generator,
        max_waiting: int,
        needs_spectra: bool,
        is_plain: bool,
    ) -> None:
        self._parts, self._traced, self._check = parts, traced, check
        self._rtol, self._generator = rtol, generator
        self._needs_spectra = needs_spectra
        self._epsilon = torch.finfo(traced.network.dtype).eps
        self._ranks: dict[Scope, GradientRank] = {}
        self._spectra: dict[Scope, Spectrum] = {}
        self._open = {
            part: SpectrumAccumulator(
                check.num_rows,
                part.num_parameters,
                generator,
                max_waiting=max_waiting,
                epsilon=self._epsilon,
                # In float32 what a Gram matrix does not resolve is rounding: its factor, or its eigenvalues, decide.
                is_postponed=not needs_spectra and self._epsilon == EPSILON,
            )
            for part in parts
        }
        # Of these alone the norm is known, from the check; and inputs with equal outputs are most often merged ones.
        self._seeks_independence = (
            not needs_spectra and is_plain and self._epsilon == EPSILON and _are_distinct(traced.whole.outputs)
        )
        self._sums: dict[Scope, GramMatrix] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all ranks are known."""
        return not self._open

    def try_last_layers(self, *, max_elements: int) -> None:
        """Look at some layers of many parameters first, where their gradients may be all that is needed.

        They are the last ones, for which the backward passes are short.

        Args:
            max_elements: See `layer_gradients`.
        """
        if not self._seeks_independence or len(self._parts) > 1 or any(part.is_tiny for part in self._open.values()):
            return
        least = OVERSAMPLING * self._check.num_rows
        large = [layer for layer in reversed(self._traced.network.layers) if layer.num_parameters >= least]
        for layer in large[:_NUM_TRIED]:
            for found in layer_gradients(self._traced, self._check, layers=[layer], max_elements=max_elements):
                self._conclude(self._parts, rows_independent_in_few_columns(found.gradients, self._generator))
            if self.is_complete:
                return

    def add(self, layer: Layer, gradients: LayerGradients) -> None:
        """Take the gradients with respect to the next layer into account."""
        concerned = [part for part in self._parts if part in self._open and layer in part.layers]
        if self._needs_spectra:
            gram = cache(partial(gram_of, gradients)) if len(concerned) > 1 else None
            for part in concerned:
                self._open[part].add(gradients, gram)
        else:
            self._add_unless_independent(concerned, gradients)
        for part in concerned:
            if part.kind == "layer" and part in self._open:  # Complete: judge it now and free its memory.
                self._judge(part)

    def finished(self) -> tuple[dict[Scope, GradientRank], dict[Scope, Spectrum]]:
        """Ranks of all parts, and singular values of those whose rank was not proved without."""
        for part in list(self._open):
            if part in self._sums:
                self._conclude([part], independent_rows(self._sums.pop(part)))
            if part in self._open:
                self._judge(part)
        self._ranks |= {part: gradient_rank(spectrum, rtol=self._rtol) for part, spectrum in self._spectra.items()}
        return {part: self._ranks[part] for part in self._parts}, self._spectra

    def _add_unless_independent(self, concerned: Sequence[Scope], gradients: LayerGradients) -> None:
        gram = None
        sought = [part for part in concerned if self._seeks_independence and not self._open[part].is_tiny]
        if sought and gradients.num_columns >= gradients.num_rows:
            independent = rows_independent_in_few_columns(gradients, self._generator)
            if independent is None:
                gram = gram_of(gradients)
                independent = independent_rows(gram)
            self._conclude(sought, independent)
        for part in concerned:
            if part not in self._open:
                continue
            self._open[part].add(gradients)
            if part in sought and part.kind != "layer" and part.num_parameters >= gradients.num_rows:
                total = self._sums.setdefault(part, GramMatrix(gradients.num_rows, gradients.device))
                gradients.add_gram(total) if gram is None else total.add(gram)

    def _conclude(self, parts: Iterable[Scope], independent: IndependentRows | None) -> None:
        """Rows that are independent in some columns are so in every part that has these."""
        if independent is None:
            return
        for part in parts:
            rtol = self._open[part].default_rtol if self._rtol is None else self._rtol
            proved = independent.rank(rtol=rtol, epsilon=self._epsilon, norm=self._check.norm(part.layers))
            if proved is not None:
                self._ranks[part] = proved
                del self._open[part]
                self._sums.pop(part, None)

    def _judge(self, part: Scope) -> None:
        accumulator = self._open.pop(part)
        proved = None if self._needs_spectra else accumulator.proved_rank(rtol=self._rtol)
        if proved is None:
            self._spectra[part] = accumulator.spectrum()
        else:
            self._ranks[part] = proved


def _are_distinct(outputs: Tensor) -> bool:
    """Whether no two inputs have equal outputs."""
    rows = outputs.detach().reshape(len(outputs), -1)
    return len(torch.unique(rows, dim=0)) == len(rows)


def behavior_jacobian(evaluation: Evaluation) -> Tensor | None:
    """Return the behavior's derivative by the outputs, as blocks for `weighted_rows`; ``None`` where they are the same.

    Raises:
        ValueError: If the behavior is probabilities and the outputs have no axis of classes.
    """
    if not evaluation.settings.counts_probabilities:
        return None
    shape = evaluation.trace.outputs.shape
    if len(shape) == 1 or shape[1] < 2:  # noqa: PLR2004 - classes
        raise ValueError(
            f"behavior='probabilities' needs outputs with at least two classes along their second axis, got shape "
            f"{tuple(shape)}: pass behavior=lambda module, inputs: ... that returns the probabilities"
        )
    return softmax_jacobian(evaluation.trace.outputs.to(torch.float64))


def project_outputs(evaluation: Evaluation, generator: Generator) -> bool:
    """See the outputs along fewer random directions, where there are too many of them to be measured one by one.

    Args:
        evaluation: The network on the probe; its rows are projected from now on.
        generator: A generator on the CPU, which draws the directions.

    Returns:
        Whether they are, so that ranks are lower bounds.
    """
    num_outputs = evaluation.num_outputs
    num_directions = evaluation.settings.num_directions(evaluation.probe.size, num_outputs)
    if num_directions == num_outputs:
        return False
    evaluation.notes.append(
        f"ranks are lower bounds: the {num_outputs} outputs of each input are seen along {num_directions} random "
        f"orthonormal directions"
    )
    evaluation.network.project_outputs(num_outputs, num_directions, generator)
    return True


def measure_ranks(
    evaluation: Evaluation, scopes: Sequence[Scope], hessian: HessianMeasurement | None, generator: Generator
) -> tuple[dict[Scope, GradientRank], dict[Scope, Spectrum]]:
    """Find the ranks of the behavioral gradients of each scope.

    Args:
        evaluation: The network on the probe.
        scopes: The scopes to report, the network last.
        hessian: Is shown the gradients of the outputs on the way; ``None`` where the Hessian is not measured.
        generator: A generator on the CPU, for random vectors.

    Returns:
        The ranks, and the singular values where the rank was not proved without them.
    """
    settings, jacobian = evaluation.settings, behavior_jacobian(evaluation)
    check = AutogradCheck(evaluation.traced, generator)
    measurement = RankMeasurement(
        scopes,
        evaluation.traced,
        check,
        rtol=settings.rtol,
        generator=generator,
        max_waiting=min(GROUP_ELEMENTS, evaluation.max_elements) // 2,
        needs_spectra=settings.spectrum or hessian is not None,
        is_plain=jacobian is None,
    )
    measurement.try_last_layers(max_elements=evaluation.max_elements)
    if measurement.is_complete:
        return measurement.finished()
    for measured in layer_gradients(evaluation.traced, check, max_elements=evaluation.max_elements):
        measurement.add(
            measured.layer, measured.gradients if jacobian is None else measured.gradients.weighted(jacobian)
        )
        if hessian is not None:
            hessian.add(measured.layer, measured.gradients)
        if measured.note is not None:
            evaluation.notes.append(measured.note)
    return measurement.finished()


def rank_fields(rank: GradientRank, spectrum: Spectrum | None) -> dict[str, Any]:
    """Return what a record says of a rank, by field.

    Args:
        rank: The rank of the gradients of a scope.
        spectrum: Their singular values; ``None`` where the rank was proved without them.
    """
    return {
        "gradient_rank": rank.rank,
        "gradient_rank_gap": rank.gap,
        "gradient_rank_at": rank.at,
        "gradient_effective_rank": rank.effective_rank,
        "gradient_rtol": rank.rtol,
        "gradient_method": rank.method,
        "log_det_gram": None if spectrum is None else log_det_gram(spectrum.singular_values, rank.rank),
    }
