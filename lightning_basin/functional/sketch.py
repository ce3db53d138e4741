"""Behavioral gradients of one layer, factored or dense, and the spectrum of several side by side.

A matrix of gradients is never needed itself: its Gram matrix gives the singular values above
``GRAM_RESOLUTION``, and its product with a few random vectors, the sketch, gives the rank below. Both are
sums over layers. Axis letters: k inputs, c outputs per input, m = k * c rows, t positions of a sequence
(or calls of one layer), r columns of a sketch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gram import GramMatrix
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.proofs import OVERSAMPLING, IndependentRows, independent_rows, rank_of_sketch
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

_CHUNK_ELEMENTS = 2**21  # float64 numbers in a temporary: 16 MiB
_CACHED_ELEMENTS = 2**18  # and in one that stays in the cache until it is used: 2 MiB
_WAITING_ELEMENTS = 2**26  # and in the matrices or factors that wait for their sketch: 512 MiB
_DENSE_ELEMENTS = 2e7  # entries of a matrix that is decomposed as it stands: 160 MB
_TINY_WORK = 2e7  # min(rows, columns)**2 * max(rows, columns) up to which singular values take milliseconds
_FEW_COLUMNS = 2  # times as many as rows: singular values then shrink little more than the norm does
_MUCH_LESS = 2.0  # times the operations
_DENSE_WORK = 2e9  # and rows**2 * columns, the cost of its triangular factor: about 0.1 s


@dataclass(frozen=True, eq=False)
class KhatriRaoGradients:
    r"""Gradients by a matrix that multiplies what enters, kept as their factors.

    Row (x, j) of the gradients is that of output j on input x by the matrix, row by row:
    :math:`\sum_t b_{xjt} a_{xt}^T`. A linear layer has one position t for each element of a sequence, a convolution one
    for each place of its kernel. A bias is one more activation, which is always 1; a look-up has one-hot activations.

    Attributes:
        activations: What is multiplied, shape ``(k, t, d_in)``.
        output_gradients: Derivative of each output by the products, shape ``(k, c, t, d_out)``.
    """

    activations: Tensor
    output_gradients: Tensor

    @property
    def num_rows(self) -> int:
        """Number of inputs times outputs per input."""
        return self.output_gradients.shape[0] * self.output_gradients.shape[1]

    @property
    def num_columns(self) -> int:
        """Number of entries of the matrix."""
        return self.activations.shape[-1] * self.output_gradients.shape[-1]

    @property
    def num_elements(self) -> int:
        """Numbers that are held."""
        return self.activations.numel() + self.output_gradients.numel()

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.activations.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors, in which they are multiplied."""
        return self.activations.dtype

    def rows(self) -> Tensor:
        """The gradients themselves, shape ``(m, d_out * d_in)``."""
        k, c, t, d_out = self.output_gradients.shape
        signals = self.output_gradients.transpose(2, 3).reshape(k, c * d_out, t)
        return (signals @ self.activations).reshape(k * c, -1)

    @property
    def gram_work(self) -> float:
        """Operations that the Gram matrix takes, about."""
        k, c, t, d_out = self.output_gradients.shape
        by_pair = d_out if t == 1 else self.num_columns
        return (k * c) ** 2 * by_pair + (0.0 if t == 1 else 2.0 * k * c * t * self.num_columns)

    def add_gram(self, gram: GramMatrix) -> None:
        r"""Add the products of all pairs of rows.

        With one position, :math:`G G^T = (A A^T \otimes 1 1^T) \circ B B^T`, which never forms a row.
        """
        k, c, t, d_out = self.output_gradients.shape
        if t == 1:
            activations = self.activations.reshape(k, -1)
            gram.add_scaled_products(self.output_gradients.reshape(k * c, d_out), activations @ activations.mT)
            return
        units = max(1, _CHUNK_ELEMENTS // max(1, k * c * self.activations.shape[-1]))
        for start in range(0, d_out, units):
            chosen = self.output_gradients[..., start : start + units].transpose(2, 3).reshape(k, -1, t)
            gram.add_products((chosen @ self.activations).reshape(k * c, -1))

    def narrowed(self, num_columns: int, generator: Generator) -> "KhatriRaoGradients":
        """Times random orthonormal vectors, Kronecker products of such: ``num_columns`` of them, or hardly more.

        Rows that are independent then are so in the whole, whose singular values are no smaller (Weyl, 1912).
        """
        k, c, t, d_out = self.output_gradients.shape
        d_in = self.activations.shape[-1]
        share = math.sqrt(min(1.0, num_columns / max(1, self.num_columns)))
        if t == 1:  # What enters costs nothing; the c rows of an input need as many directions of what leaves.
            from_inputs, from_outputs = d_in, max(c, math.ceil(num_columns / max(1, min(k, d_in))))
        else:
            from_inputs, from_outputs = math.ceil(d_in * share), math.ceil(d_out * share)
        return replace(
            self,
            activations=_mixed(self.activations, from_inputs, generator),
            output_gradients=_mixed(self.output_gradients, from_outputs, generator),
        )

    def kronecker_spectrum(self) -> Tensor | None:
        r"""Singular values where all inputs have the same derivatives, as for a linear layer at the end.

        Then :math:`G = A \otimes B`, whose singular values are the products of those of A and of B. Shape
        ``(min(m, N),)``; ``None`` where derivatives differ.
        """
        k, c, t, d_out = self.output_gradients.shape
        signals = self.output_gradients[:1]
        if t != 1 or k == 0 or not bool((self.output_gradients == signals).all()):
            return None
        left, right = singular_values(self.activations.reshape(k, -1)), singular_values(signals.view(c, d_out))
        products = torch.outer(left, right).flatten().sort(descending=True).values
        return torch.cat([products, products.new_zeros(min(self.num_rows, self.num_columns) - len(products))])

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        r"""The matrix times random rank-one vectors, the Khatri-Rao sketch, shape ``(m, num_columns)``.

        :math:`Y_{(x,j),i} = \sum_t (u_i \cdot b_{xjt})(v_i \cdot \tilde a_{xt})` with Gaussian u and v. Rank-one
        functionals span the dual space, so that almost surely the rank is ``min(num_columns, rank)``.
        Scaled so that ``Y @ Y.T`` has the Gram matrix as its mean.
        """
        k, c, t, d_out = self.output_gradients.shape
        if t > 1 and self.activations.shape[-1] < num_columns and k * c * self.num_columns <= _WAITING_ELEMENTS:
            # Fewer operations. The rows take much more than their factors: some of them at a time.
            inputs = max(1, _CACHED_ELEMENTS // max(1, c * self.num_columns))
            parts = (self._of_inputs(chunk).rows() for chunk in _blocks(k, inputs))
            return _fourier_sketch(parts, (k * c, self.num_columns), num_columns, generator, self.device)
        left = _gaussian(d_out, num_columns, generator, like=self.activations)
        right = _gaussian(self.activations.shape[-1], num_columns, generator, like=self.activations)
        sketch = self.activations.new_empty(k, c, num_columns)
        inputs = max(1, _CHUNK_ELEMENTS // max(1, c * t * num_columns))
        right.div_(math.sqrt(num_columns))
        for chunk in _blocks(k, inputs):
            entering = self.activations[chunk] @ right
            if t == 1:
                torch.matmul(self.output_gradients[chunk].squeeze(2), left, out=sketch[chunk]).mul_(entering)
            else:
                sketch[chunk] = (self.output_gradients[chunk] @ left).mul_(entering.unsqueeze(1)).sum(2)
        return sketch.view(k * c, num_columns)

    def _of_inputs(self, chosen: slice) -> "KhatriRaoGradients":
        return replace(self, activations=self.activations[chosen], output_gradients=self.output_gradients[chosen])

    def combination(self, weights: Tensor) -> Tensor:
        """``weights @ rows()`` without the rows; ``weights`` and result have shapes ``(m,)`` and ``(N,)``."""
        k, c = self.output_gradients.shape[:2]
        signals = torch.einsum("kj,kjto->kto", weights.view(k, c).to(self.dtype), self.output_gradients)
        return torch.einsum("kto,ktd->od", signals, self.activations).flatten().to(weights.dtype)

    def magnitudes(self) -> "KhatriRaoGradients":
        """With the magnitude of every term in place of the term: bounds what may cancel in their sums."""
        return replace(self, activations=self.activations.abs(), output_gradients=self.output_gradients.abs())

    def weighted(self, blocks: Tensor) -> "KhatriRaoGradients | DenseGradients":
        """Rows combined within each input, ``weighted_rows(rows(), blocks)``, by combining their factors.

        Args:
            blocks: Shape ``(k, c', c)``; or ``(1, m', m)``, which mixes inputs and gives dense rows.
        """
        k, _, t, d_out = self.output_gradients.shape
        if blocks.shape[0] != k:
            return DenseGradients(self.rows()).weighted(blocks)
        signals = (blocks @ self.output_gradients.flatten(2)).view(k, -1, t, d_out)
        return replace(self, output_gradients=signals)


@dataclass(frozen=True, eq=False)
class DenseGradients:
    """Gradients of any layer as the matrix they are.

    Attributes:
        matrix: Shape ``(m, N)``.
    """

    matrix: Tensor

    @property
    def num_rows(self) -> int:
        """Number of inputs times outputs per input."""
        return self.matrix.shape[0]

    @property
    def num_columns(self) -> int:
        """Number of parameters."""
        return self.matrix.shape[1]

    @property
    def num_elements(self) -> int:
        """Numbers that are held."""
        return self.matrix.numel()

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.matrix.dtype

    def rows(self) -> Tensor:
        """The matrix, shape ``(m, N)``."""
        return self.matrix

    @property
    def gram_work(self) -> float:
        """Operations that the Gram matrix takes, about."""
        return float(self.num_rows) ** 2 * self.num_columns

    def add_gram(self, gram: GramMatrix) -> None:
        """Add the products of all pairs of rows."""
        gram.add_products(self.matrix)

    def narrowed(self, num_columns: int, generator: Generator) -> "DenseGradients":
        """Times random orthonormal vectors, each of which mixes columns of its own; see `KhatriRaoGradients.narrowed`.

        The last columns, fewer than ``num_columns``, may be left out.
        """
        mixed = self.num_columns // max(1, num_columns)
        if mixed <= 1:
            return self
        drawn = _gaussian(mixed, num_columns, generator, like=self.matrix)
        columns = self.matrix[:, : mixed * num_columns].reshape(-1, mixed, num_columns)
        return DenseGradients(torch.einsum("mgs,gs->ms", columns, drawn / drawn.norm(dim=0)))

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        """The matrix times random vectors, see `_fourier_sketch`; shape ``(m, num_columns)``."""
        parts = (self.matrix[chunk] for chunk in _blocks(self.num_rows, _CHUNK_ELEMENTS // max(1, self.num_columns)))
        return _fourier_sketch(parts, (self.num_rows, self.num_columns), num_columns, generator, self.device)

    def combination(self, weights: Tensor) -> Tensor:
        """``weights @ rows()``; shapes ``(m,)`` and ``(N,)``."""
        return (weights.to(self.dtype) @ self.matrix).to(weights.dtype)

    def magnitudes(self) -> "DenseGradients":
        """With the magnitude of every entry."""
        return DenseGradients(self.matrix.abs())

    def weighted(self, blocks: Tensor) -> "DenseGradients":
        """Rows combined within each input, or, by one block, all of them; see `weighted_rows`."""
        return DenseGradients(weighted_rows(self.matrix, blocks))


@dataclass(frozen=True, eq=False)
class StackedGradients:
    """Gradients of a layer whose parameters fall into parts, side by side.

    Attributes:
        parts: Of different columns each.
        columns: For each part where its columns stand; columns of no part are zero.
        num_rows: m.
        num_columns: N.
        device: Where they are.
    """

    parts: "tuple[KhatriRaoGradients | DenseGradients, ...]"
    columns: tuple[Tensor, ...]
    num_rows: int
    num_columns: int
    device: torch.device

    @property
    def num_elements(self) -> int:
        """Numbers that are held."""
        return sum(part.num_elements for part in self.parts)

    def rows(self) -> Tensor:
        """The matrix, shape ``(m, N)``."""
        rows = self._zeros(self.num_rows, self.num_columns)
        for part, columns in zip(self.parts, self.columns, strict=True):
            rows.index_copy_(1, columns, part.rows())
        return rows

    @property
    def gram_work(self) -> float:
        """Operations that the Gram matrix takes, about."""
        return sum(part.gram_work for part in self.parts)

    def add_gram(self, gram: GramMatrix) -> None:
        """Add the products of all pairs of rows."""
        for part in self.parts:
            part.add_gram(gram)

    def narrowed(self, num_columns: int, generator: Generator) -> "StackedGradients":
        """Each part narrowed by its share of the columns; see `KhatriRaoGradients.narrowed`."""
        share = min(1.0, num_columns / max(1, self.num_columns))
        parts = [part.narrowed(math.ceil(part.num_columns * share), generator) for part in self.parts]
        return stacked(parts, self.num_rows, self.device)

    def kronecker_spectrum(self) -> Tensor | None:
        """See `KhatriRaoGradients.kronecker_spectrum`; ``None`` where there are other parts."""
        part = self.parts[0] if len(self.parts) == 1 else None
        is_whole = part is not None and part.num_columns == self.num_columns
        return part.kronecker_spectrum() if is_whole and isinstance(part, KhatriRaoGradients) else None

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        """The sum of the sketches of the parts, shape ``(m, num_columns)``."""
        sketch = self._zeros(self.num_rows, num_columns)
        for part in self.parts:
            sketch += part.sketch(num_columns, generator)
        return sketch

    def combination(self, weights: Tensor) -> Tensor:
        """``weights @ rows()`` without the rows; shapes ``(m,)`` and ``(N,)``."""
        combination = weights.new_zeros(self.num_columns)
        for part, columns in zip(self.parts, self.columns, strict=True):
            combination[columns] = part.combination(weights)
        return combination

    def magnitudes(self) -> "StackedGradients":
        """With the magnitude of every term of every part."""
        return replace(self, parts=tuple(part.magnitudes() for part in self.parts))

    def _zeros(self, *shape: int) -> Tensor:
        dtype = self.parts[0].dtype if self.parts else torch.float64
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def weighted(self, blocks: Tensor) -> "StackedGradients":
        """Rows combined within each input, or, by one block, all of them; see `weighted_rows`."""
        parts = tuple(part.weighted(blocks) for part in self.parts)
        return replace(self, parts=parts, num_rows=blocks.shape[0] * blocks.shape[1])


LayerGradients = KhatriRaoGradients | DenseGradients | StackedGradients


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


def gram_of(gradients: LayerGradients) -> GramMatrix:
    """Products of all pairs of rows, of which the lower half is computed."""
    gram = GramMatrix(gradients.num_rows, gradients.device)
    gradients.add_gram(gram)
    return gram


def stacked(
    parts: Sequence[KhatriRaoGradients | DenseGradients], num_rows: int, device: torch.device
) -> StackedGradients:
    """Parts side by side, in their order."""
    widths = [part.num_columns for part in parts]
    columns = torch.split(torch.arange(sum(widths), device=device), widths)
    return StackedGradients(tuple(parts), tuple(columns), num_rows=num_rows, num_columns=sum(widths), device=device)


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, max(1, size)):
        yield slice(start, min(length, start + max(1, size)))


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
        max_waiting: int = _WAITING_ELEMENTS,
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
        """The rank, where it can be proved without the spectrum; see `lightning_basin.functional.proofs`.

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


def _fourier_sketch(
    parts: Iterable[Tensor], shape: tuple[int, int], num_columns: int, generator: Generator, device: torch.device
) -> Tensor:
    """A matrix times a subsampled random Fourier transform, shape ``(m, num_columns)``.

    The transform costs ``N log N`` a row where a Gaussian matrix costs ``N * num_columns`` (Woolfe, Liberty, Rokhlin
    and Tygert, 2008). Its frequencies repeat on columns at equal distances, all that is used where every eighth channel
    is alive: so the columns are put into a random order first. The diagonal is random and continuous: it keeps the rank
    almost surely if any does, which almost every order makes sure of. Scaled so that ``Y @ Y.T`` has the Gram matrix
    as its mean.

    Args:
        parts: Rows of the matrix, all of them one after the other.
        shape: Of the matrix, ``(m, N)``.
        num_columns: Of the sketch.
        generator: On the CPU.
        device: Of the matrix.
    """
    length = _fast_length(max(shape[1], num_columns + 2))
    order = torch.randperm(shape[1], generator=generator).to(device)
    diagonal = torch.rand(shape[1], generator=generator, dtype=torch.float64).add_(0.5)
    diagonal = diagonal.mul_(torch.randint(0, 2, diagonal.shape, generator=generator).mul_(2).sub_(1)).to(device)
    # The imaginary parts of the first and the last frequency are always zero: leave both out.
    picked = torch.randperm(length - 2, generator=generator)[:num_columns].add_(2).to(device)
    sketch, start = torch.empty(shape[0], num_columns, dtype=torch.float64, device=device), 0
    for part in parts:
        for rows in torch.split(part, max(1, _CACHED_ELEMENTS // length)):
            mixed = torch.gather(rows, 1, order.expand_as(rows)).mul_(diagonal)  # Faster than any indexing.
            spectrum = torch.view_as_real(torch.fft.rfft(mixed, n=length)).flatten(1)
            torch.gather(spectrum, 1, picked.expand(len(rows), -1), out=sketch[start : start + len(rows)])
            start += len(rows)
    # Each picked cosine or sine has mean square 1/2; the diagonal has mean square 13/12.
    return sketch.mul_(math.sqrt(2 * 12 / 13 / num_columns))


def _fast_length(least: int) -> int:
    """The smallest even number without other prime factors than 2, 3 and 5: of such lengths are fast transforms."""
    lengths: list[int] = []
    for odd in (3**i * 5**j for i in range(4) for j in range(3)):
        length = 2 * odd
        while length < least:
            length *= 2
        lengths.append(length)
    return min(lengths)


def _mixed(tensor: Tensor, count: int, generator: Generator) -> Tensor:
    """The last axis along random orthonormal directions, as many as asked for; unless there are no more."""
    length = tensor.shape[-1]
    return tensor if count >= length else tensor @ torch.linalg.qr(_gaussian(length, count, generator, like=tensor)).Q


def _gaussian(rows: int, columns: int, generator: Generator, *, like: Tensor) -> Tensor:
    # Drawn on the CPU: the same numbers on every device. In float32: as random, in a fifth of the time.
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(like.device, torch.float64)
