"""Ranks of the behavioral gradients of layers, blocks and the network, each by the cheapest proof that decides."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gram import GramMatrix
from lightning_basin.functional.proofs import OVERSAMPLING, IndependentRows, independent_rows
from lightning_basin.functional.rank import EPSILON, GradientRank, Spectrum, gradient_rank
from lightning_basin.functional.sketch import (
    LayerGradients,
    SpectrumAccumulator,
    gram_of,
    rows_independent_in_few_columns,
)
from lightning_basin.gradients import AutogradCheck, layer_gradients
from lightning_basin.layers import Layer, TracedProbe

_NUM_TRIED = 2  # layers, whose gradients may show that those of the network are independent


@dataclass(frozen=True)
class Part:
    """Layers that are reported together: a single one, a block, or the network.

    Attributes:
        kind: Which of these.
        name: Of the layer or block.
        layers: At least one.
    """

    kind: Literal["layer", "block", "network"]
    name: str
    layers: tuple[Layer, ...]

    @property
    def num_parameters(self) -> int:
        """Of all its layers."""
        return sum(layer.num_parameters for layer in self.layers)


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
        parts: Sequence[Part],
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
        self._ranks: dict[Part, GradientRank] = {}
        self._spectra: dict[Part, Spectrum] = {}
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
        self._sums: dict[Part, GramMatrix] = {}

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

    def finished(self) -> tuple[dict[Part, GradientRank], dict[Part, Spectrum]]:
        """Ranks of all parts, and singular values of those whose rank was not proved without."""
        for part in list(self._open):
            if part in self._sums:
                self._conclude([part], independent_rows(self._sums.pop(part)))
            if part in self._open:
                self._judge(part)
        self._ranks |= {part: gradient_rank(spectrum, rtol=self._rtol) for part, spectrum in self._spectra.items()}
        return {part: self._ranks[part] for part in self._parts}, self._spectra

    def _add_unless_independent(self, concerned: Sequence[Part], gradients: LayerGradients) -> None:
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

    def _conclude(self, parts: Iterable[Part], independent: IndependentRows | None) -> None:
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

    def _judge(self, part: Part) -> None:
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
