"""Rank and singular values of gradients side by side.

A matrix of gradients is never needed itself: its Gram matrix gives the singular values above ``GRAM_RESOLUTION``, and
its product with a few random vectors, the sketch, gives the rank below. Both are sums over layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from lightning_basin.functional.certificates import OVERSAMPLING, IndependentRows, independent_rows, rank_of_sketch
from lightning_basin.functional.factored import DenseGradients
from lightning_basin.functional.gradients import LayerGradients, gram_of
from lightning_basin.functional.gram import GramMatrix
from lightning_basin.functional.projections import WAITING_ELEMENTS
from lightning_basin.functional.rank import (
    EPSILON,
    GRAM_RESOLUTION,
    GradientRank,
    Spectrum,
    check_rtol,
    default_rtol,
    resolved_tolerances,
    singular_values,
)

_DENSE_ELEMENTS = 2e7  # entries of a matrix that is decomposed as it stands: 160 MB
_TINY_WORK = 2e7  # min(rows, columns)**2 * max(rows, columns) up to which singular values take milliseconds
_FEW_COLUMNS = 2  # times as many as rows: singular values then shrink little more than the norm does
_MUCH_LESS = 2.0  # times the operations
_DENSE_WORK = 2e9  # and rows**2 * columns, the cost of its triangular factor: about 0.1 s


def rows_independent_in_few_columns(gradients: LayerGradients, generator: Generator) -> IndependentRows | None:
    """Prove that all rows are independent, where this takes much less than their Gram matrix.

    Args:
        gradients: Of at least as many columns as rows.
        generator: On the CPU; for random vectors.

    Returns:
        ``None`` where that is not so, or not cheaper.
    """
    if not isinstance(gradients, DenseGradients) and (spectrum := gradients.kronecker_spectrum()) is not None:
        smallest, largest = float(spectrum[-1]), float(spectrum[0])
        is_clear = smallest > GRAM_RESOLUTION * largest
        return IndependentRows(gradients.num_rows, smallest / 2, smallest, largest) if is_clear else None
    narrow = gradients.narrowed(_FEW_COLUMNS * gradients.num_rows, generator)
    return independent_rows(gram_of(narrow)) if _MUCH_LESS * narrow.gram_work < gradients.gram_work else None


class SpectrumAccumulator:
    """Rank and singular values of matrices side by side, ``[G_1 | G_2 | ...]``, seen one at a time.

    Gram matrices are summed. Where these leave open what is asked, the whole is decomposed as it stands if it is small,
    else sketches are summed. The matrices are kept until this is known, as long as they fit.

    Args:
        num_rows: Rows of every matrix.
        num_columns: Columns of all matrices together.
        generator: On the CPU; the source of the sketch's random vectors.
        max_waiting: Numbers that may be held of matrices that wait for their sketch.
        epsilon: Rounding of the numbers in the matrices, where these were evaluated in a lower precision than float64.
        is_postponed: Whether Gram matrices are formed only when the spectrum is asked for, as it may not be.

    Attributes:
        is_tiny: Whether the spectrum takes milliseconds.
    """

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        generator: Generator,
        *,
        max_waiting: int = WAITING_ELEMENTS,
        epsilon: float = EPSILON,
        is_postponed: bool = False,
    ) -> None:
        self._max_waiting = max_waiting
        self._is_postponed = is_postponed
        self._epsilon = epsilon
        self._num_rows = num_rows
        self._num_columns = num_columns
        self._generator = generator
        fewer, more = sorted((num_rows, num_columns))
        work = fewer**2 * more
        is_narrow, fits = num_columns <= 2 * num_rows, fewer * more <= min(max_waiting, _DENSE_ELEMENTS)
        # All of a tiny or small matrix waits until it is decomposed as it stands.
        self.is_tiny = work <= _TINY_WORK and (is_narrow or fits)
        self._is_small = is_narrow or (work <= _DENSE_WORK and fits)
        self._has_more_rows = num_rows > num_columns
        self._gram: GramMatrix | None = None
        self._sketch: Tensor | None = None
        self._waiting: list[LayerGradients] = []
        self._num_added = 0

    def add(self, gradients: LayerGradients, gram: Callable[[], GramMatrix] | None = None) -> None:
        """Take the next matrix into account.

        Args:
            gradients: Of any number of columns.
            gram: Returns `gram_of` these, where others need it too.
        """
        self._waiting.append(gradients)
        self._num_added += gradients.num_columns
        if not self._is_postponed:
            self._add_gram(gradients, gram)
        if not self._is_small and sum(waiting.num_elements for waiting in self._waiting) > self._max_waiting:
            self._form_gram()
            self._add_sketches()

    def _add_gram(self, gradients: LayerGradients, gram: Callable[[], GramMatrix] | None = None) -> None:
        if self.is_tiny or self._has_more_rows:
            return
        if gram is not None and gradients.num_columns == self._num_columns:
            self._gram = gram()  # A single matrix needs no sum of its own.
            return
        if self._gram is None:
            self._gram = GramMatrix(self._num_rows, gradients.device)
        gradients.add_gram(self._gram) if gram is None else self._gram.add(gram())

    def _form_gram(self) -> None:
        """Add the Gram matrices that have been postponed; from now on none is."""
        if self._is_postponed:
            self._is_postponed = False
            for gradients in self._waiting:
                self._add_gram(gradients)

    def spectrum(self) -> Spectrum:
        """Singular values of everything that was added.

        Raises:
            RuntimeError: If some columns have not been added.
        """
        self._check_complete()
        factored = self._kronecker_spectrum()
        if factored is not None:
            return factored
        self._form_gram()
        if not self._is_small and self._gram is not None:
            return sketched_spectrum(
                self._gram.whole(), self._add_sketches, num_columns=2 * self._num_rows, epsilon=self._epsilon
            )
        rtol = self.default_rtol
        if self._gram is not None and (self._is_rounded or independent_rows(self._gram) is not None):
            return Spectrum(
                singular_values=_bulk(self._gram.whole())[0], rtol=rtol, method="gram", epsilon=self._epsilon
            )
        return Spectrum(singular_values=singular_values(self._matrix()), rtol=rtol, method="svd", epsilon=self._epsilon)

    @property
    def _is_rounded(self) -> bool:
        """Whether all that a Gram matrix does not resolve is rounding."""
        return self._epsilon >= GRAM_RESOLUTION

    @property
    def default_rtol(self) -> float:
        """That of the matrix which is decomposed: the whole, or its sketch."""
        num_columns = self._num_columns if self._is_small else 2 * self._num_rows
        return default_rtol(self._num_rows, num_columns, self._epsilon)

    def proved_rank(self, *, rtol: float | None = None) -> GradientRank | None:
        """The rank, where it can be proved without the spectrum; see `lightning_basin.functional.certificates`.

        Args:
            rtol: Relative tolerance; ``None`` means that of the matrix which would be decomposed.

        Raises:
            RuntimeError: If some columns have not been added.
            ValueError: If ``rtol`` is not inside ``(0, 1)``.
        """
        check_rtol(rtol)
        self._check_complete()
        if self.is_tiny or self._kronecker_spectrum() is not None:  # The spectrum is as fast.
            return None
        if rtol is None:
            rtol = self.default_rtol
        found = None
        if self._gram is not None or self._has_more_rows:
            gram = gram_of(DenseGradients(self._matrix().mT)) if self._gram is None else self._gram
            independent = independent_rows(gram, resolution=rtol)
            found = None if independent is None else independent.rank(rtol=rtol, epsilon=self._epsilon)
        if found is None and self._is_rounded and not self._has_more_rows:
            return None  # The eigenvalues of a Gram matrix are faster.
        if found is None:
            found = rank_of_sketch(self._narrow_sketch(), rtol=rtol, epsilon=self._epsilon)
        if found is None:
            return None
        resolved = resolved_tolerances(self.default_rtol, self._epsilon)
        return replace(found, at={tolerance: rank for tolerance, rank in found.at.items() if tolerance in resolved})

    def _check_complete(self) -> None:
        """Judge nothing by some of the columns: their rank may be smaller than that of all."""
        if self._num_added != self._num_columns:
            raise RuntimeError(f"all {self._num_columns} columns must be added to be judged, got {self._num_added}")

    def _narrow_sketch(self) -> Tensor:
        if self._sketch is not None:  # Some could not wait: their sketch is the wide one.
            return self._add_sketches()
        num_columns = math.ceil(OVERSAMPLING * min(self._num_rows, self._num_columns))
        if self._num_columns > num_columns:
            return _sum_of_sketches(self._waiting, num_columns, self._generator)
        matrix = self._matrix().mT if self._has_more_rows else self._matrix()
        return matrix if matrix.shape[1] <= num_columns else DenseGradients(matrix).sketch(num_columns, self._generator)

    def _matrix(self) -> Tensor:
        assert self._sketch is None, "a matrix of which some part is a sketch by now is not decomposed as it stands"
        return torch.cat([gradients.rows() for gradients in self._waiting], dim=1)

    def _kronecker_spectrum(self) -> Spectrum | None:
        """Of a single matrix that is a Kronecker product."""
        alone = self._waiting[0] if len(self._waiting) == 1 else None
        if alone is None or alone.num_columns != self._num_columns or isinstance(alone, DenseGradients):
            return None
        values = alone.kronecker_spectrum()
        if values is None:
            return None
        rtol = default_rtol(self._num_rows, self._num_columns, self._epsilon)
        return Spectrum(singular_values=values, rtol=rtol, method="svd", epsilon=self._epsilon)

    def _add_sketches(self) -> Tensor:
        """The wide sketch of everything that was added."""
        if self._waiting:
            sketch = _sum_of_sketches(self._waiting, 2 * self._num_rows, self._generator)
            self._waiting.clear()
            self._sketch = sketch if self._sketch is None else self._sketch.add_(sketch)
        assert self._sketch is not None
        return self._sketch


def _sum_of_sketches(gradients: Sequence[LayerGradients], num_columns: int, generator: Generator) -> Tensor:
    """The sketch of matrices side by side."""
    total = gradients[0].sketch(num_columns, generator)
    for block in gradients[1:]:
        total.add_(block.sketch(num_columns, generator))
    return total


def sketched_spectrum(
    gram: Tensor, sketch: Callable[[], Tensor], *, num_columns: int, epsilon: float = EPSILON
) -> Spectrum:
    """Singular values of a matrix from its Gram matrix, and from its sketch where squaring hides them.

    The Gram matrix is exact in the bulk of the spectrum and blind below ``GRAM_RESOLUTION``; the sketch is exact
    to a factor near 1 all the way down. Each is used where it is the better one. Where the Gram matrix resolves
    every singular value, that proves full rank and no sketch is needed; nor is it where all that it does not resolve is
    rounding.

    Args:
        gram: Shape ``(m, m)``.
        sketch: Returns a sketch, scaled so that ``sketch @ sketch.T`` has mean ``gram``, shape ``(m, num_columns)``.
        num_columns: At least m.
        epsilon: Rounding of the matrix.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 1e-3, 1e-10], dtype=torch.float64))
        >>> spectrum = sketched_spectrum(matrix @ matrix, lambda: matrix, num_columns=3)
        >>> spectrum.singular_values.log10().round().tolist(), spectrum.method
        ([0.0, -3.0, -10.0], 'gram+sketch')
    """
    rtol = default_rtol(gram.shape[0], num_columns, epsilon)
    bulk, num_resolved = _bulk(gram)
    if num_resolved == bulk.numel() or epsilon >= GRAM_RESOLUTION:
        return Spectrum(singular_values=bulk, rtol=rtol, method="gram", epsilon=epsilon)
    tail = singular_values(sketch())[num_resolved:]
    if num_resolved:
        tail = tail.clamp(max=float(bulk[num_resolved - 1]))
    values = torch.cat([bulk[:num_resolved], tail])
    return Spectrum(singular_values=values, rtol=rtol, method="gram+sketch", epsilon=epsilon)


def _bulk(gram: Tensor) -> tuple[Tensor, int]:
    """Singular values by a Gram matrix, descending, and how many of them it resolves."""
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).sqrt_()
    return values, int((values > GRAM_RESOLUTION * values[:1]).sum())


def gradient_spectrum(gradients: Sequence[LayerGradients], *, generator: Generator) -> Spectrum:
    """Singular values of matrices of gradients side by side.

    Args:
        gradients: At least one; all with the same number of rows.
        generator: On the CPU; the source of the sketch's random vectors.

    Raises:
        ValueError: If there is none, or they differ in the number of rows.

    Example:
        >>> identity = DenseGradients(torch.eye(3, dtype=torch.float64))
        >>> gradient_spectrum([identity, identity], generator=torch.Generator()).singular_values.square().round()
        tensor([2., 2., 2.], dtype=torch.float64)
    """
    if len({block.num_rows for block in gradients}) != 1:
        raise ValueError(f"gradients must share one number of rows, got {[block.num_rows for block in gradients]}")
    columns = sum(block.num_columns for block in gradients)
    accumulator = SpectrumAccumulator(gradients[0].num_rows, columns, generator)
    for block in gradients:
        accumulator.add(block)
    return accumulator.spectrum()
