"""Singular values of gradients side by side.

A matrix of gradients is never needed itself: its Gram matrix gives the singular values above ``GRAM_RESOLUTION``, and
its product with a few random vectors, the sketch, gives those below. Both are sums over layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from lightning_basin.functional.certificates import independent_rows
from lightning_basin.functional.factored import DenseGradients
from lightning_basin.functional.gradients import LayerGradients, kronecker_spectrum, sum_of_sketches
from lightning_basin.functional.gram import GramMatrix, leading_eigenvector
from lightning_basin.functional.projections import WAITING_ELEMENTS
from lightning_basin.functional.rank import (
    EPSILON,
    GRAM_RESOLUTION,
    LEAST_OF_GRAM,
    Spectrum,
    default_rtol,
    gradient_rank,
    numerical_rank,
    singular_values,
)
from lightning_basin.functional.smallest_values import mixed_triangle, values_behind_gap

_DENSE_ELEMENTS = 2e7  # elements of a matrix that is decomposed as it stands: 160 MB
_DENSE_WORK = 2e9  # and rows**2 * columns, the cost of its triangular factor: about 0.1 s
_TINY_WORK = 2e7  # min(rows, columns)**2 * max(rows, columns) up to which singular values take milliseconds


class SpectrumAccumulator:
    """Singular values of matrices side by side, ``[G_1 | G_2 | ...]``, seen one at a time.

    Gram matrices are summed. Where these leave open what is asked, the whole is decomposed as it stands if it is small,
    else sketches are summed. The matrices are kept until this is known, as long as they fit.

    Args:
        num_rows: The number of rows of every matrix.
        num_columns: The number of columns of all matrices together.
        generator: A generator on the CPU, the source of the sketch's random vectors.
        max_waiting: The number of elements that may be held of matrices that wait for their sketch.
        epsilon: The rounding of the matrices, where they were evaluated in a lower precision than float64.
        finds_leading: Whether the leading left singular vector is found, too, where there is a Gram matrix.

    Attributes:
        is_tiny: Whether the spectrum takes milliseconds.
        default_rtol: The default relative tolerance of the matrix that is decomposed: the whole, or its sketch.

    Example:
        >>> identity = DenseGradients(torch.eye(3, dtype=torch.float64))
        >>> accumulator = SpectrumAccumulator(3, 6, Generator())
        >>> accumulator.add(identity)
        >>> accumulator.add(identity)
        >>> accumulator.spectrum().singular_values.square().round()
        tensor([2., 2., 2.], dtype=torch.float64)
    """

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        generator: Generator,
        *,
        max_waiting: int = WAITING_ELEMENTS,
        epsilon: float = EPSILON,
        finds_leading: bool = False,
    ) -> None:
        self._num_rows, self._num_columns = num_rows, num_columns
        self._generator, self._max_waiting, self._epsilon = generator, max_waiting, epsilon
        self._finds_leading = finds_leading
        fewer, more = sorted((num_rows, num_columns))
        work = fewer**2 * more
        is_narrow, fits = num_columns <= 2 * num_rows, fewer * more <= min(max_waiting, _DENSE_ELEMENTS)
        # All of a tiny or small matrix waits until it is decomposed as it stands.
        self.is_tiny = work <= _TINY_WORK and (is_narrow or fits)
        self._is_small = is_narrow or (work <= _DENSE_WORK and fits)
        self.default_rtol = default_rtol(num_rows, num_columns if self._is_small else 2 * num_rows, epsilon)
        self._gram: GramMatrix | None = None
        self._sketch: Tensor | None = None
        self._waiting: list[LayerGradients] = []
        self._outside_gram: list[LayerGradients] = []
        self._num_added = 0

    def add(self, gradients: LayerGradients, gram: Callable[[], GramMatrix] | None = None) -> None:
        """Take the next matrix into account.

        Args:
            gradients: The matrix, with any number of columns.
            gram: Returns `gram_of` the matrix, where others need it too. ``None`` forms it only when it is needed.

        Raises:
            ValueError: If the matrix has another number of rows.
        """
        if gradients.num_rows != self._num_rows:
            raise ValueError(f"gradients must have {self._num_rows} rows, got {gradients.num_rows}")
        self._waiting.append(gradients)
        self._num_added += gradients.num_columns
        if gram is None or not self._decides_by_gram:
            self._outside_gram.append(gradients)
        elif gradients.num_columns == self._num_columns:
            self._gram = gram()  # A single matrix needs no sum of its own.
        else:
            self._gram = self._gram or GramMatrix(self._num_rows, gradients.device)
            self._gram.add(gram())
        if not self._is_small and sum(waiting.num_elements for waiting in self._waiting) > self._max_waiting:
            self.gram()
            self._add_sketches()

    @property
    def _decides_by_gram(self) -> bool:
        return not self.is_tiny and self._num_rows <= self._num_columns

    def gram(self) -> GramMatrix | None:
        """Return the products of all pairs of rows so far; ``None`` where singular values are found without them."""
        if not self._decides_by_gram:
            return None
        for gradients in self._outside_gram:
            self._gram = self._gram or GramMatrix(self._num_rows, gradients.device)
            gradients.add_gram(self._gram)
        self._outside_gram.clear()
        return self._gram

    def matrices(self) -> Sequence[LayerGradients] | None:
        """Return all matrices; ``None`` where some have become sketches.

        Raises:
            RuntimeError: If some columns have not been added: the rank of some may be smaller than that of all.
        """
        if self._num_added != self._num_columns:
            raise RuntimeError(f"all {self._num_columns} columns must be added to be judged, got {self._num_added}")
        return None if self._sketch is not None else self._waiting

    def spectrum(self) -> Spectrum:
        """Find the singular values of everything that was added.

        Raises:
            RuntimeError: If some columns have not been added.
        """
        matrices = self.matrices()
        if matrices is not None and len(matrices) == 1 and (values := kronecker_spectrum(matrices[0])) is not None:
            rtol = default_rtol(self._num_rows, self._num_columns, self._epsilon)
            return Spectrum(singular_values=values, rtol=rtol, method="svd", epsilon=self._epsilon)
        gram = self.gram()
        spectrum = self._spectrum(gram)
        if gram is None or not self._finds_leading:
            return spectrum
        return replace(spectrum, leading=leading_eigenvector(gram))

    def _spectrum(self, gram: GramMatrix | None) -> Spectrum:
        """The singular values, by the Gram matrix of everything where there is one."""
        if gram is not None and not self._is_small:
            return sketched_spectrum(
                gram.lower, self._add_sketches, num_columns=2 * self._num_rows, epsilon=self._epsilon
            )
        # Of a float32 matrix all that its Gram matrix does not resolve is rounding.
        if gram is not None and (self._epsilon >= GRAM_RESOLUTION or independent_rows(gram) is not None):
            values = _singular_values_of_gram(gram.lower)[0]
            return Spectrum(singular_values=values, rtol=self.default_rtol, method="gram", epsilon=self._epsilon)
        matrices = self.matrices()
        assert matrices is not None, "a matrix of which some part is a sketch is not decomposed as it stands"
        values = singular_values(torch.cat([gradients.rows() for gradients in matrices], dim=1)).cpu()
        return Spectrum(singular_values=values, rtol=self.default_rtol, method="svd", epsilon=self._epsilon)

    def _add_sketches(self) -> Tensor:
        """The sketch of everything that was added."""
        if self._waiting:
            sketch = sum_of_sketches(self._waiting, 2 * self._num_rows, self._generator)
            self._waiting.clear()
            self._sketch = sketch if self._sketch is None else self._sketch.add_(sketch)
        assert self._sketch is not None
        return self._sketch


def sketched_spectrum(
    gram: Tensor, sketch: Callable[[], Tensor], *, num_columns: int, epsilon: float = EPSILON
) -> Spectrum:
    """Find singular values by a Gram matrix, and by a sketch where squaring hides them.

    The Gram matrix is exact in the bulk of the spectrum and blind below ``GRAM_RESOLUTION``; the sketch is exact to a
    factor near 1 all the way down. Each is used where it is the better one. No sketch is needed where the Gram matrix
    resolves every singular value, which proves full rank, or where all that it does not resolve is rounding.

    Args:
        gram: The products of all pairs of rows of the matrix, shape ``(m, m)``, of which the lower half is looked at.
        sketch: Returns a sketch, scaled so that ``sketch @ sketch.T`` has mean ``gram``, shape ``(m, num_columns)``.
        num_columns: The number of columns of the sketch, at least m.
        epsilon: The rounding of the matrix.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 1e-3, 1e-10], dtype=torch.float64))
        >>> spectrum = sketched_spectrum(matrix @ matrix, lambda: matrix, num_columns=3)
        >>> spectrum.singular_values.log10().round().tolist(), spectrum.method
        ([0.0, -3.0, -10.0], 'gram+sketch')
    """
    rtol = default_rtol(gram.shape[0], num_columns, epsilon)
    values_of_gram, num_resolved = _singular_values_of_gram(gram)
    if num_resolved == values_of_gram.numel() or epsilon >= GRAM_RESOLUTION:
        return Spectrum(singular_values=values_of_gram, rtol=rtol, method="gram", epsilon=epsilon)
    triangle = mixed_triangle(sketch())
    small = values_behind_gap(triangle, num_resolved) if num_resolved else None
    tail = torch.linalg.svdvals(triangle).cpu()[num_resolved:] if small is None else small.values
    if num_resolved:
        tail = tail.clamp(max=float(values_of_gram[num_resolved - 1]))
    values = torch.cat([values_of_gram[:num_resolved], tail])
    return Spectrum(singular_values=values, rtol=rtol, method="gram+sketch", epsilon=epsilon)


def _singular_values_of_gram(gram: Tensor) -> tuple[Tensor, int]:
    """Singular values by the lower half of a Gram matrix, descending, on the CPU, and how many of them it resolves."""
    values = torch.linalg.eigvalsh(gram, UPLO="L").flip(0).clamp_(min=0).sqrt_().cpu()
    return values, min(numerical_rank(values, rtol=GRAM_RESOLUTION), int((values > LEAST_OF_GRAM).sum()))


def behavioral_gradient_rank(gradients: Tensor, *, rtol: float | None = None) -> int:
    """Find the rank of behavioral gradients given as a dense matrix, as a measurement does.

    Args:
        gradients: One row per output of one input, shape ``(m, N)``.
        rtol: The relative tolerance on singular values; ``None`` means ``max(shape) * eps`` of the matrix that is
            decomposed, eps of float64: all of it, or where it is large a sketch of 2m columns.

    Raises:
        ValueError: If ``gradients`` is not a matrix, or ``rtol`` is not inside ``(0, 1)``.

    Example:
        >>> behavioral_gradient_rank(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        1
    """
    if gradients.ndim != 2:
        raise ValueError(f"gradients must be a matrix (rows, parameters), got shape {tuple(gradients.shape)}")
    if gradients.numel() == 0:
        return 0
    matrix = DenseGradients(gradients.to(torch.float64))
    accumulator = SpectrumAccumulator(matrix.num_rows, matrix.num_columns, Generator().manual_seed(0))
    accumulator.add(matrix)
    return gradient_rank(accumulator.spectrum(), rtol=rtol).rank
