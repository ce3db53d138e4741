"""Behavioral gradients of one layer, factored or dense, and the spectrum of several side by side.

A matrix of gradients is never needed itself: its Gram matrix gives the singular values above
``GRAM_RESOLUTION``, and its product with a few random vectors, the sketch, gives the rank below. Both are
sums over layers. Axis letters: k inputs, c outputs per input, m = k * c rows, t positions of a sequence
(or calls of one layer), r columns of a sketch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor

from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.rank import (
    EPSILON,
    GRAM_RESOLUTION,
    RANK_TOLERANCES,
    GradientRank,
    Spectrum,
    check_rtol,
    default_rtol,
    singular_values,
)

_CHUNK_ELEMENTS = 2**22  # float64 numbers in a temporary: 32 MiB
_WAITING_ELEMENTS = 2**26  # and in the matrices or factors that wait for their sketch: 512 MiB
_DENSE_ELEMENTS = 2e7  # entries of a matrix that is decomposed as it stands: 160 MB
_POWER_STEPS = 20  # towards the largest and the smallest singular value, for the gap
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

    def rows(self) -> Tensor:
        """The gradients themselves, shape ``(m, d_out * d_in)``."""
        k, c, t, d_out = self.output_gradients.shape
        signals = self.output_gradients.transpose(2, 3).reshape(k, c * d_out, t)
        return (signals @ self.activations).reshape(k * c, -1)

    @cached_property
    def gram(self) -> Tensor:
        r"""Products of all pairs of rows, shape ``(m, m)``.

        With one position, :math:`G G^T = (A A^T \otimes 1 1^T) \circ B B^T`, which never forms a row.
        """
        k, c, t, d_out = self.output_gradients.shape
        if t == 1:
            signals = self.output_gradients.reshape(k * c, d_out)
            activations = self.activations.reshape(k, -1)
            products = (signals @ signals.mT).view(k, c, k, c)
            return products.mul_((activations @ activations.mT)[:, None, :, None]).view(k * c, k * c)
        gram = self.activations.new_zeros(k * c, k * c)
        units = max(1, _CHUNK_ELEMENTS // max(1, k * c * self.activations.shape[-1]))
        for start in range(0, d_out, units):
            signals = self.output_gradients[..., start : start + units].transpose(2, 3).reshape(k, -1, t)
            part = (signals @ self.activations).reshape(k * c, -1)
            gram.addmm_(part, part.mT)
        return gram

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        r"""The matrix times random rank-one vectors, the Khatri-Rao sketch, shape ``(m, num_columns)``.

        :math:`Y_{(x,j),i} = \sum_t (u_i \cdot b_{xjt})(v_i \cdot \tilde a_{xt})` with Gaussian u and v. Rank-one
        functionals span the dual space, so that almost surely the rank is ``min(num_columns, rank)``.
        Scaled so that ``Y @ Y.T`` has the Gram matrix as its mean.
        """
        k, c, t, d_out = self.output_gradients.shape
        if t > 1 and self.activations.shape[-1] < num_columns and k * c * self.num_columns <= _WAITING_ELEMENTS:
            return DenseGradients(self.rows()).sketch(num_columns, generator)  # Fewer operations.
        left = _gaussian(d_out, num_columns, generator, like=self.activations)
        right = _gaussian(self.activations.shape[-1], num_columns, generator, like=self.activations)
        sketch = self.activations.new_empty(k, c, num_columns)
        inputs = max(1, _CHUNK_ELEMENTS // max(1, c * t * num_columns))
        for start in range(0, k, inputs):
            chunk = slice(start, start + inputs)
            entering = (self.activations[chunk] @ right).unsqueeze(1)
            sketch[chunk] = (self.output_gradients[chunk] @ left).mul_(entering).sum(2)
        return sketch.view(k * c, num_columns).div_(math.sqrt(num_columns))

    def combination(self, weights: Tensor) -> Tensor:
        """``weights @ rows()`` without the rows; ``weights`` and result have shapes ``(m,)`` and ``(N,)``."""
        k, c = self.output_gradients.shape[:2]
        signals = torch.einsum("kj,kjto->kto", weights.view(k, c), self.output_gradients)
        return torch.einsum("kto,ktd->od", signals, self.activations).flatten()

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

    def rows(self) -> Tensor:
        """The matrix, shape ``(m, N)``."""
        return self.matrix

    @cached_property
    def gram(self) -> Tensor:
        """Products of all pairs of rows, shape ``(m, m)``."""
        return self.matrix @ self.matrix.mT

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        """The matrix times a subsampled random Fourier transform, shape ``(m, num_columns)``.

        The transform costs ``N log N`` a row where a Gaussian matrix costs ``N * num_columns`` (Woolfe, Liberty,
        Rokhlin and Tygert, 2008). The random diagonal is continuous, so that the rank is kept almost surely and
        not only with high probability. Scaled so that ``Y @ Y.T`` has the Gram matrix as its mean.
        """
        length = 2 ** math.ceil(math.log2(max(self.num_columns, num_columns + 2)))
        device = self.matrix.device
        diagonal = torch.rand(self.num_columns, generator=generator, dtype=torch.float64).add_(0.5)
        diagonal.mul_(torch.randint(0, 2, diagonal.shape, generator=generator).mul_(2).sub_(1))
        # The imaginary parts of the first and the last frequency are always zero: leave both out.
        picked = torch.randperm(length - 2, generator=generator)[:num_columns].add_(2).to(device)
        diagonal = diagonal.to(device)
        sketch = self.matrix.new_empty(self.num_rows, num_columns)
        rows = max(1, _CHUNK_ELEMENTS // length)
        for start in range(0, self.num_rows, rows):
            chunk = slice(start, start + rows)
            spectrum = torch.fft.rfft(self.matrix[chunk] * diagonal, n=length)
            sketch[chunk] = torch.view_as_real(spectrum).flatten(1)[:, picked]
        # Each picked cosine or sine has mean square 1/2; the diagonal has mean square 13/12.
        return sketch.mul_(math.sqrt(2 * 12 / 13 / num_columns))

    def combination(self, weights: Tensor) -> Tensor:
        """``weights @ rows()``; shapes ``(m,)`` and ``(N,)``."""
        return weights @ self.matrix

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
    """

    parts: "tuple[KhatriRaoGradients | DenseGradients, ...]"
    columns: tuple[Tensor, ...]
    num_rows: int
    num_columns: int

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

    @cached_property
    def gram(self) -> Tensor:
        """Products of all pairs of rows, shape ``(m, m)``."""
        gram = self._zeros(self.num_rows, self.num_rows)
        for part in self.parts:
            gram += part.gram
        return gram

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

    def _zeros(self, *shape: int) -> Tensor:
        device = self.columns[0].device if self.columns else None
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def weighted(self, blocks: Tensor) -> "StackedGradients":
        """Rows combined within each input, or, by one block, all of them; see `weighted_rows`."""
        parts = tuple(part.weighted(blocks) for part in self.parts)
        return replace(self, parts=parts, num_rows=blocks.shape[0] * blocks.shape[1])


LayerGradients = KhatriRaoGradients | DenseGradients | StackedGradients


class SpectrumAccumulator:
    """Singular values of matrices side by side, ``[G_1 | G_2 | ...]``, seen one at a time.

    Where the whole is small it is decomposed as it stands. Otherwise the Gram matrices are summed; and if their sum
    leaves singular values open, so are the sketches. The matrices are kept until this is known, as long as they fit.

    Args:
        num_rows: Rows of every matrix.
        num_columns: Columns of all matrices together.
        generator: On the CPU; the source of the sketch's random vectors.
        max_waiting: Numbers that may be held of matrices that wait for their sketch.
    """

    def __init__(
        self, num_rows: int, num_columns: int, generator: Generator, *, max_waiting: int = _WAITING_ELEMENTS
    ) -> None:
        self._max_waiting = max_waiting
        self._num_rows = num_rows
        self._num_columns = num_columns
        self._generator = generator
        self._is_small = num_columns <= 2 * num_rows or (
            num_rows * num_columns <= _DENSE_ELEMENTS and num_rows**2 * num_columns <= _DENSE_WORK
        )
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None
        self._sketch: Tensor | None = None
        self._unsketched: list[LayerGradients] = []

    def add(self, gradients: LayerGradients) -> None:
        """Take the next matrix into account."""
        if self._is_small:
            self._rows.append(gradients.rows())
            return
        self._gram = gradients.gram.clone() if self._gram is None else self._gram.add_(gradients.gram)
        self._unsketched.append(gradients)
        if sum(waiting.num_elements for waiting in self._unsketched) > self._max_waiting:
            self._add_sketches()

    def spectrum(self) -> Spectrum:
        """Singular values of everything that was added.

        Raises:
            RuntimeError: If nothing was added.
        """
        if self._rows:
            rtol = default_rtol(self._num_rows, self._num_columns)
            return Spectrum(singular_values=singular_values(torch.cat(self._rows, 1)), rtol=rtol, method="svd")
        if self._gram is None:
            raise RuntimeError("add at least one matrix of gradients before asking for the spectrum")
        return sketched_spectrum(self._gram, self._add_sketches, num_columns=2 * self._num_rows)

    def full_rank(self, *, rtol: float | None = None) -> GradientRank | None:
        """Full rank, where the Gram matrix proves it without singular values; see `full_rank_of_gram`.

        Args:
            rtol: Relative tolerance; ``None`` means that of the matrix which would be decomposed.

        Raises:
            ValueError: If ``rtol`` is not inside ``(0, 1)``.
        """
        check_rtol(rtol)
        if self._gram is None:
            return None
        return full_rank_of_gram(
            self._gram, rtol=default_rtol(self._num_rows, 2 * self._num_rows) if rtol is None else rtol
        )

    def _add_sketches(self) -> Tensor:
        sketches = [gradients.sketch(2 * self._num_rows, self._generator) for gradients in self._unsketched]
        self._unsketched.clear()
        if self._sketch is not None:
            sketches.append(self._sketch)
        self._sketch = torch.stack(sketches).sum(0) if len(sketches) > 1 else sketches[0]
        return self._sketch


def full_rank_of_gram(gram: Tensor, *, rtol: float) -> GradientRank | None:
    """Prove full rank by a Cholesky factor, ``m**3 / 3`` operations where eigenvalues take several times as many.

    The factor of ``gram - tau**2`` exists if and only if every singular value is above tau (Sylvester, 1852). With tau
    at ``GRAM_RESOLUTION`` of the largest one, rounding cannot pretend this.

    Args:
        gram: Shape ``(m, m)``.
        rtol: Relative tolerance that the rank is wanted at.

    Returns:
        The rank, or ``None`` where a singular value may be below ``GRAM_RESOLUTION`` or ``rtol``.

    Example:
        >>> full_rank_of_gram(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)), rtol=1e-12).rank
        2
        >>> full_rank_of_gram(torch.ones(2, 2, dtype=torch.float64), rtol=1e-12) is None
        True
    """
    num_rows = gram.shape[0]
    # The largest row sum bounds the largest eigenvalue from above (Gershgorin, 1931): a bound on the safe side.
    bound = float(gram.abs().sum(1).max())
    resolution = max(rtol, GRAM_RESOLUTION)
    shift = resolution**2 * bound
    if bound == 0.0:
        return None
    factor, failed = torch.linalg.cholesky_ex(gram - shift * torch.eye(num_rows, dtype=gram.dtype, device=gram.device))
    if int(failed):
        return None
    vector = torch.ones(num_rows, 1, dtype=gram.dtype, device=gram.device)
    forward, inverse = vector, vector
    for _ in range(_POWER_STEPS):
        forward = gram @ (forward / forward.norm())
        inverse = torch.cholesky_solve(inverse / inverse.norm(), factor)
    largest, smallest = math.sqrt(float(forward.norm())), math.sqrt(shift + 1 / float(inverse.norm()))
    return GradientRank(
        rank=num_rows,
        gap=math.log10(smallest / (EPSILON * largest)),
        at={tolerance: num_rows for tolerance in RANK_TOLERANCES if tolerance <= resolution},
        effective_rank=None,
        rtol=rtol,
        method="cholesky",
    )


def sketched_spectrum(gram: Tensor, sketch: Callable[[], Tensor], *, num_columns: int) -> Spectrum:
    """Singular values of a matrix from its Gram matrix, and from its sketch where squaring hides them.

    The Gram matrix is exact in the bulk of the spectrum and blind below ``GRAM_RESOLUTION``; the sketch is exact
    to a factor near 1 all the way down. Each is used where it is the better one. Where the Gram matrix resolves
    every singular value, that proves full rank and no sketch is needed.

    Args:
        gram: Shape ``(m, m)``.
        sketch: Returns a sketch, scaled so that ``sketch @ sketch.T`` has mean ``gram``, shape ``(m, num_columns)``.
        num_columns: At least m.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 1e-3, 1e-10], dtype=torch.float64))
        >>> spectrum = sketched_spectrum(matrix @ matrix, lambda: matrix, num_columns=3)
        >>> spectrum.singular_values.log10().round().tolist(), spectrum.method
        ([0.0, -3.0, -10.0], 'gram+sketch')
    """
    rtol = default_rtol(gram.shape[0], num_columns)
    bulk = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).sqrt_()
    num_resolved = int((bulk > GRAM_RESOLUTION * bulk[0]).sum())
    if num_resolved == bulk.numel():
        return Spectrum(singular_values=bulk, rtol=rtol, method="gram")
    tail = singular_values(sketch())[num_resolved:]
    if num_resolved:
        tail = tail.clamp(max=float(bulk[num_resolved - 1]))
    return Spectrum(singular_values=torch.cat([bulk[:num_resolved], tail]), rtol=rtol, method="gram+sketch")


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


def _gaussian(rows: int, columns: int, generator: Generator, *, like: Tensor) -> Tensor:
    # Drawn on the CPU: the same numbers on every device.
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like.device)
