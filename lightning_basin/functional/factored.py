"""Behavioral gradients of one layer as a matrix, factored or dense.

Axis letters: k inputs, c outputs per input, m = k * c rows, t positions of a sequence (or calls of one layer).
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gram import GramMatrix, slices
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.projections import (
    CACHED_ELEMENTS,
    CHUNK_ELEMENTS,
    WAITING_ELEMENTS,
    draw_gaussian,
    fourier_sketch,
    mix,
    temporary_elements,
)


@dataclass(frozen=True, eq=False)
class KhatriRaoGradients:
    r"""Gradients by a matrix that multiplies input activations, kept as their factors.

    Row (x, j) of the gradients is the gradient of output j on input x by the matrix, row by row:
    :math:`\sum_t b_{xjt} a_{xt}^T`. A linear layer has one position t for each element of a sequence, a convolution one
    for each place of its kernel. A bias is one more activation, which is always 1; a look-up has one-hot activations.

    Attributes:
        activations: The input activations, shape ``(k, t, d_in)``.
        output_gradients: The derivative of each output by the products, shape ``(k, c, t, d_out)``.
    """

    activations: Tensor
    output_gradients: Tensor

    @property
    def num_rows(self) -> int:
        """The number of inputs times outputs per input."""
        return self.output_gradients.shape[0] * self.output_gradients.shape[1]

    @property
    def num_columns(self) -> int:
        """The number of elements of the matrix."""
        return self.activations.shape[-1] * self.output_gradients.shape[-1]

    @property
    def num_elements(self) -> int:
        """The number of elements that are held."""
        return self.activations.numel() + self.output_gradients.numel()

    @property
    def device(self) -> torch.device:
        """The device of the gradients."""
        return self.activations.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors, in which they are multiplied."""
        return self.activations.dtype

    @cached_property
    def has_equal_outputs(self) -> bool:
        """Whether all inputs have the same output gradients, as for a linear layer at the end."""
        return bool((self.output_gradients == self.output_gradients[:1]).all())

    def rows(self) -> Tensor:
        """Multiply the factors out, shape ``(m, d_out * d_in)``."""
        k, c, t, d_out = self.output_gradients.shape
        signals = self.output_gradients.transpose(2, 3).reshape(k, c * d_out, t)
        return signals.bmm(self.activations).view(k * c, -1)

    @property
    def gram_work(self) -> float:
        """The number of operations that the Gram matrix takes, about."""
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
        num_chunks = max(1, round(k * c * self.num_columns / temporary_elements(self.device, CHUNK_ELEMENTS)))
        for units in slices(d_out, math.ceil(d_out / num_chunks)):
            chosen = self.output_gradients[..., units].transpose(2, 3).reshape(k, -1, t)
            gram.add_products(chosen.bmm(self.activations).view(k * c, -1))

    def narrowed(self, num_columns: int, generator: Generator) -> "KhatriRaoGradients":
        """Multiply by Kronecker products of random orthonormal vectors: ``num_columns`` of them, or hardly more."""
        k, c, t, d_out = self.output_gradients.shape
        d_in = self.activations.shape[-1]
        if (
            t == 1
        ):  # Input activations cost nothing. The c rows of an input need as many directions of output gradients.
            from_inputs, from_outputs = d_in, max(c, math.ceil(num_columns / max(1, min(k, d_in))))
        else:
            fraction = math.sqrt(min(1.0, num_columns / max(1, self.num_columns)))
            from_inputs, from_outputs = math.ceil(d_in * fraction), math.ceil(d_out * fraction)
        return KhatriRaoGradients(
            mix(self.activations, from_inputs, generator), mix(self.output_gradients, from_outputs, generator)
        )

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        r"""Multiply by random vectors of rank one: the Khatri-Rao sketch, shape ``(m, num_columns)``.

        :math:`Y_{(x,j),i} = \sum_t (u_i \cdot b_{xjt})(v_i \cdot \tilde a_{xt})` with Gaussian u and v. Rank-one
        functionals span the dual space, so that almost surely the rank is ``min(num_columns, rank)``.
        Scaled so that ``Y @ Y.T`` has the Gram matrix as its mean.
        """
        k, c, t, d_out = self.output_gradients.shape
        if t > 1 and self.activations.shape[-1] < num_columns and k * c * self.num_columns <= WAITING_ELEMENTS:
            # Fewer operations. The rows take much more than their factors: some of them at a time.
            inputs = max(1, temporary_elements(self.device, CACHED_ELEMENTS) // max(1, c * self.num_columns))
            parts = (self._of_inputs(chunk).rows() for chunk in slices(k, inputs))
            return fourier_sketch(parts, (k * c, self.num_columns), num_columns, generator, self.device)
        left = draw_gaussian(d_out, num_columns, generator, like=self.activations)
        right = draw_gaussian(self.activations.shape[-1], num_columns, generator, like=self.activations)
        sketch = self.activations.new_empty(k, c, num_columns)
        inputs = max(1, temporary_elements(self.device, CHUNK_ELEMENTS) // max(1, c * t * num_columns))
        right.div_(math.sqrt(num_columns))
        for chunk in slices(k, inputs):
            entering = self.activations[chunk] @ right
            if t == 1:
                torch.matmul(self.output_gradients[chunk].squeeze(2), left, out=sketch[chunk]).mul_(entering)
            else:
                sketch[chunk] = (self.output_gradients[chunk] @ left).mul_(entering.unsqueeze(1)).sum(2)
        return sketch.view(k * c, num_columns)

    def _of_inputs(self, chosen: slice) -> "KhatriRaoGradients":
        return replace(self, activations=self.activations[chosen], output_gradients=self.output_gradients[chosen])

    def combination(self, weights: Tensor) -> Tensor:
        """Compute ``weights @ rows()`` without the rows; weights and result have shapes ``(m,)`` and ``(N,)``."""
        k, c, t, d_out = self.output_gradients.shape
        signals = weights.view(k, 1, c).to(self.dtype).bmm(self.output_gradients.flatten(2)).view(k * t, d_out)
        return signals.mT.mm(self.activations.flatten(0, 1)).flatten().to(weights.dtype)

    def weighted(self, blocks: Tensor) -> "KhatriRaoGradients | DenseGradients":
        """Combine rows within each input, ``weighted_rows(rows(), blocks)``, by combining their factors.

        Args:
            blocks: The weights, shape ``(k, c', c)``; or ``(1, m', m)``, which mixes inputs and gives dense rows.
        """
        k, _, t, d_out = self.output_gradients.shape
        if blocks.shape[0] != k:
            return DenseGradients(self.rows()).weighted(blocks)
        signals = (blocks @ self.output_gradients.flatten(2)).view(k, blocks.shape[1], t, d_out)
        return replace(self, output_gradients=signals)


@dataclass(frozen=True, eq=False)
class DenseGradients:
    """Gradients of any layer as the matrix they are.

    Attributes:
        matrix: The gradients, shape ``(m, N)``.
    """

    matrix: Tensor

    @property
    def num_rows(self) -> int:
        """The number of inputs times outputs per input."""
        return self.matrix.shape[0]

    @property
    def num_columns(self) -> int:
        """The number of parameters."""
        return self.matrix.shape[1]

    @property
    def num_elements(self) -> int:
        """The number of elements that are held."""
        return self.matrix.numel()

    @property
    def device(self) -> torch.device:
        """The device of the gradients."""
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix."""
        return self.matrix.dtype

    def rows(self) -> Tensor:
        """Return the matrix, shape ``(m, N)``."""
        return self.matrix

    @property
    def gram_work(self) -> float:
        """The number of operations that the Gram matrix takes, about."""
        return float(self.num_rows) ** 2 * self.num_columns

    def add_gram(self, gram: GramMatrix) -> None:
        """Add the products of all pairs of rows."""
        gram.add_products(self.matrix)

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        """Multiply by random vectors, see `fourier_sketch`; shape ``(m, num_columns)``."""
        num_rows = temporary_elements(self.device, CHUNK_ELEMENTS) // max(1, self.num_columns)
        parts = (self.matrix[chunk] for chunk in slices(self.num_rows, num_rows))
        return fourier_sketch(parts, (self.num_rows, self.num_columns), num_columns, generator, self.device)

    def combination(self, weights: Tensor) -> Tensor:
        """Compute ``weights @ rows()``; shapes ``(m,)`` and ``(N,)``."""
        return (weights.to(self.dtype) @ self.matrix).to(weights.dtype)

    def weighted(self, blocks: Tensor) -> "DenseGradients":
        """Combine rows within each input, or by one block all of them; see `weighted_rows`."""
        return DenseGradients(weighted_rows(self.matrix, blocks))
