"""Ranks and derivatives in exact arithmetic: the other channel from which the tests take what they expect.

A network with integer weights has integer derivatives. Here they are carried forward by hand-written rules beside the
values, with no automatic differentiation and no rounding anywhere, and ranks are taken modulo primes. Where a network
divides, the numbers are fractions; where it takes roots or exponentials, decimals of 60 digits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from torch import Tensor, nn

_LARGE_PRIME = 2**61 - 1
_PRIME = 2**31 - 1  # products of two residues still fit into 64 bits
_EXACT_IN_FLOAT64 = 2**53  # a network whose numbers pass this is no oracle for float64

DIGITS = 60
"""Of decimals; half of them are left after elimination, in tests that check this."""


def exact_rank(matrix: np.ndarray) -> int:
    """The rank of an integer matrix.

    The rank modulo a prime is never larger than the true one, and smaller only where the prime divides all of its
    largest minors; two large primes at once practically never do.

    Example:
        >>> exact_rank(np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])), exact_rank(np.zeros((2, 2), dtype=np.int64))
        (2, 0)
    """
    return max(rank_modulo(matrix, _PRIME), rank_modulo(matrix.astype(object), _LARGE_PRIME))


def rank_of_fractions(matrix: np.ndarray) -> int:
    """The rank of a matrix of fractions: that of their residues, where the primes divide no denominator.

    Example:
        >>> from fractions import Fraction
        >>> rank_of_fractions(np.array([[Fraction(1, 2), Fraction(1, 3)], [Fraction(3, 2), Fraction(1)]]))
        1
    """

    def residues(prime: int) -> np.ndarray:
        found = [int(f.numerator) * pow(int(f.denominator), -1, prime) % prime for f in matrix.ravel()]
        return np.array(found, dtype=object).reshape(matrix.shape)

    return max(rank_modulo(residues(prime), prime) for prime in (_PRIME, _LARGE_PRIME))


def rank_of_decimals(matrix: np.ndarray) -> int:
    """The rank of a matrix of decimals, by elimination with complete pivoting.

    What rounding leaves has the size of the last digits; a pivot between 1e-25 and 1e-45 of the largest would be
    neither, and no such matrix is an oracle.

    Example:
        >>> rank_of_decimals(np.array([[Decimal(1), Decimal(2)], [Decimal(2), Decimal(4)]]))
        1
    """
    remaining = matrix + Decimal(0)
    rank, largest = 0, np.abs(remaining).max() if remaining.size else Decimal(0)
    for _ in range(min(matrix.shape)):
        row, column = np.unravel_index(np.abs(remaining).argmax(), remaining.shape)
        pivot = remaining[row, column]
        if abs(pivot) <= largest * Decimal("1e-45"):
            break
        assert abs(pivot) > largest * Decimal("1e-25")
        rank += 1
        remaining = remaining - remaining[:, column : column + 1] * (remaining[row] / pivot)
        remaining = np.delete(np.delete(remaining, row, 0), column, 1)
    return rank


def exact_rank_of_wide(matrix: np.ndarray) -> int:
    """The rank of an integer matrix with many columns and entries below 2**20.

    Multiplied by a random matrix modulo the prime first, which lowers the rank with probability below rank / prime
    (Schwartz and Zippel). Its halves of 16 bits keep the products exact in float64.
    """
    rows, columns = matrix.shape
    assert np.abs(matrix).max() < 2**20
    assert columns < 2**16
    random = np.random.default_rng(0)
    projection = random.integers(0, _PRIME, size=(columns, rows + 8))
    exact = matrix.astype(np.float64)
    low = (exact @ (projection % 2**16).astype(np.float64)).astype(np.int64)
    high = (exact @ (projection // 2**16).astype(np.float64)).astype(np.int64)
    return rank_modulo((low + (high % _PRIME) * 2**16) % _PRIME, _PRIME)


def rank_modulo(matrix: np.ndarray, prime: int) -> int:
    """The rank by Gaussian elimination over the integers modulo a prime; object arrays for primes above 2**31.

    Example:
        >>> matrix = np.diag([1, 7])
        >>> rank_modulo(matrix, 7), rank_modulo(matrix, 11)
        (1, 2)
    """
    remaining = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T) % prime
    rank = 0
    while remaining.shape[0]:
        row = remaining[0]
        pivots = np.flatnonzero(row)
        remaining = remaining[1:]
        if pivots.size == 0:
            continue
        rank += 1
        pivot = pivots[0]
        normal = row * pow(int(row[pivot]), -1, prime) % prime
        remaining = (remaining - remaining[:, pivot : pivot + 1] * normal) % prime
    return rank


def exact_pseudodeterminant(matrix: np.ndarray) -> int:
    """The product of the nonzero eigenvalues of the Gram matrix of integer rows, by whole numbers of any size.

    It is the last nonzero coefficient of the characteristic polynomial, up to its sign, by the recursion of Faddeev and
    LeVerrier; an empty product is 1.

    Example:
        The eigenvalues are 4 and 0, then 1 and 4.

        >>> exact_pseudodeterminant(np.array([[1, 1], [1, 1]])), exact_pseudodeterminant(np.diag([1, 2]))
        (4, 4)
    """
    rows = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).astype(object)
    gram = rows @ rows.T
    identity = np.eye(len(gram), dtype=int).astype(object)
    product, coefficient, powers = 1, 1, 0 * identity
    for degree in range(1, len(gram) + 1):
        powers = gram @ powers + coefficient * identity
        coefficient = -int((gram * powers.T).sum()) // degree  # A division without remainder.
        if coefficient == 0:  # All further ones are zero too: no eigenvalue is negative.
            break
        product = abs(coefficient)
    return product


def _bounded(array: np.ndarray) -> np.ndarray:
    assert array.size == 0 or array.dtype == object or int(np.abs(array).max()) < _EXACT_IN_FLOAT64
    return array


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    # Both factors are below 2**53: judged before the product could wrap around.
    if left.size and right.size and left.dtype != object:
        assert int(np.abs(left).max()) * int(np.abs(right).max()) < _EXACT_IN_FLOAT64
    return left * right


@dataclass(frozen=True, eq=False)
class Dual:
    """Numbers with their first, and if wanted second, derivatives by N parameters.

    They are integers of 64 bits, or fractions or decimals in arrays of objects.

    Attributes:
        value: Any shape.
        gradient: That shape and an axis of N.
        hessian: That shape and two axes of N, or ``None``.
    """

    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray | None

    def _each(self, function: Callable[[np.ndarray], np.ndarray]) -> "Dual":
        return Dual(
            function(self.value), function(self.gradient), None if self.hessian is None else function(self.hessian)
        )

    def __getitem__(self, index: object) -> "Dual":
        """Indexes the axes of the value; may not reach into those of the derivatives."""
        return self._each(lambda array: array[index])

    def reshape(self, *shape: int) -> "Dual":
        ndim = self.value.ndim
        return self._each(lambda array: array.reshape(*shape, *array.shape[ndim:]))

    def moveaxis(self, source: int, destination: int) -> "Dual":
        return self._each(lambda array: np.moveaxis(array, source, destination))

    def pad(self, widths: Sequence[int]) -> "Dual":
        def padded(array: np.ndarray) -> np.ndarray:
            around = [*((w, w) for w in widths), *[(0, 0)] * (array.ndim - len(widths))]
            return np.pad(array, around)

        return self._each(padded)

    def sum(self, axis: int) -> "Dual":
        return self._each(lambda array: _bounded(array.sum(axis)))

    def __add__(self, other: "Dual") -> "Dual":
        # Broadcasting aligns last axes, which are those of the derivatives: align those of the values first.
        ndim = max(self.value.ndim, other.value.ndim)
        left, right = self._with_ndim(ndim), other._with_ndim(ndim)
        hessian = None if left.hessian is None or right.hessian is None else _bounded(left.hessian + right.hessian)
        return Dual(_bounded(left.value + right.value), _bounded(left.gradient + right.gradient), hessian)

    def __mul__(self, other: "Dual") -> "Dual":
        """The product rule: (fg)' = f'g + fg' and (fg)'' = f''g + f'g'ᵀ + g'f'ᵀ + fg''."""
        ndim = max(self.value.ndim, other.value.ndim)
        f, g = self._with_ndim(ndim), other._with_ndim(ndim)
        gradient = _product(f.gradient, g.value[..., None]) + _product(f.value[..., None], g.gradient)
        hessian = None
        if f.hessian is not None and g.hessian is not None:
            mixed = _product(f.gradient[..., :, None], g.gradient[..., None, :])
            hessian = _product(f.hessian, g.value[..., None, None]) + _product(f.value[..., None, None], g.hessian)
            hessian = _bounded(hessian + mixed + mixed.swapaxes(-1, -2))
        return Dual(_product(f.value, g.value), _bounded(gradient), hessian)

    def _with_ndim(self, ndim: int) -> "Dual":
        return self.reshape(*(1,) * (ndim - self.value.ndim), *self.value.shape)

    def relu(self) -> "Dual":
        """max(0, x), with derivative 0 at 0 as in every framework."""
        active = (self.value > 0).astype(np.int64)
        return Dual(
            self.value * active,
            self.gradient * active[..., None],
            None if self.hessian is None else self.hessian * active[..., None, None],
        )

    def square(self) -> "Dual":
        return self * self

    def scaled(self, factor: Any) -> "Dual":
        """Every entry times one number, or an array of constants that broadcasts to the value."""
        factor = np.asarray(factor, dtype=self.value.dtype)
        return Dual(self.value * factor, self.gradient * factor[..., None], None)

    def through(self, value: Callable[[Any], Any], slope: Callable[[Any, Any], Any]) -> "Dual":
        """A function of each number, with its derivative from the number and the function's value."""
        values = np.vectorize(value, otypes=[object])(self.value)
        slopes = np.vectorize(slope, otypes=[object])(self.value, values)
        return Dual(values, slopes[..., None] * self.gradient, None)


class ExactNetwork:
    """The parameters of a module as dual numbers, and layers that note what enters and leaves them.

    Example:
        The gradient of w x + b by w and b, at x = 3:

        >>> layer = nn.Linear(1, 1)
        >>> nn.init.constant_(layer.weight, 2.0), nn.init.zeros_(layer.bias)[0]  # doctest: +ELLIPSIS
        (...)
        >>> network = ExactNetwork(layer)
        >>> network.linear("", network.constant(np.array([[3]]))).gradient
        array([[[3, 1]]])
    """

    def __init__(self, module: nn.Module, *, second: bool = False, number: type = int) -> None:
        parameters = dict(module.named_parameters())  # in the order of layers, each shared one once
        sizes = {name: parameter.numel() for name, parameter in parameters.items() if parameter.requires_grad}
        self.num_parameters = sum(sizes.values())
        self._second = second
        self._number = number
        self._duals: dict[str, Dual] = {}
        self.columns: dict[str, list[int]] = {}
        self.entering: dict[str, list[np.ndarray]] = {}
        self.leaving: dict[str, list[np.ndarray]] = {}
        start = 0
        for name, parameter in parameters.items():
            dual = self.constant(self.numbers(parameter))
            if name in sizes:
                positions = np.arange(start, start + sizes[name])
                dual.gradient.reshape(-1, self.num_parameters)[np.arange(sizes[name]), positions] = 1
                self.columns.setdefault(name.rpartition(".")[0], []).extend(positions.tolist())
                start += sizes[name]
            self._duals[name] = dual

    def constant(self, value: np.ndarray) -> Dual:
        n = self.num_parameters
        hessian = np.zeros((*value.shape, n, n), dtype=value.dtype) if self._second else None
        return Dual(value, np.zeros((*value.shape, n), dtype=value.dtype), hessian)

    def numbers(self, tensor: Tensor) -> np.ndarray:
        """The very numbers of a tensor, of the kind that the network computes with."""
        if self._number is int:
            return integers(tensor)
        return np.vectorize(self._number, otypes=[object])(tensor.detach().double().numpy())

    def parameter(self, name: str) -> Dual:
        return self._duals[name]

    def has(self, name: str) -> bool:
        return name in self._duals

    def linear(self, name: str, entering: Dual, *, weight: str | Dual | None = None) -> Dual:
        """``W x + b`` over the last axis; ``weight`` is, or names, the parameter where it is not the layer's own."""
        matrix = weight if isinstance(weight, Dual) else self._duals[weight or f"{name}.weight".lstrip(".")]
        leaving = self._affine(entering, matrix, f"{name}.bias".lstrip("."))
        self._note(name, entering.value, leaving.value)
        return leaving

    def _affine(self, entering: Dual, matrix: Dual, bias: str) -> Dual:
        leading = entering.value.shape[:-1]
        rows = entering.reshape(-1, 1, entering.value.shape[-1])
        leaving = (rows * matrix).sum(2)
        if bias in self._duals:
            leaving = leaving + self._duals[bias]
        return leaving.reshape(*leading, matrix.value.shape[0])

    def conv2d(self, name: str, entering: Dual, *, stride: int = 1, padding: int = 0) -> Dual:
        """Cross-correlation of ``(k, channels, height, width)``, as a linear layer on patches."""
        kernel = self._duals[f"{name}.weight"]
        out_channels, in_channels, *kernel_size = kernel.value.shape
        padded = entering.pad((0, 0, padding, padding))
        k, _, *sizes = padded.value.shape
        counts = [(size - window) // stride + 1 for size, window in zip(sizes, kernel_size, strict=True)]
        positions = np.arange(padded.value[0].size).reshape(in_channels, *sizes)
        patches = [
            positions[:, i : i + kernel_size[0], j : j + kernel_size[1]].ravel()
            for i in range(0, counts[0] * stride, stride)
            for j in range(0, counts[1] * stride, stride)
        ]
        rows = padded.reshape(k, -1)[:, np.array(patches)]
        leaving = self._affine(rows, kernel.reshape(out_channels, -1), f"{name}.bias")
        self._note(name, entering.value, leaving.value)
        return leaving.moveaxis(2, 1).reshape(k, out_channels, *counts)

    def embedding(self, name: str, tokens: np.ndarray) -> Dual:
        leaving = self._duals[f"{name}.weight"][tokens]
        self._note(name, tokens, leaving.value)
        return leaving

    def _note(self, name: str, entering: np.ndarray, leaving: np.ndarray) -> None:
        self.entering.setdefault(name, []).append(entering.reshape(len(entering), -1))
        self.leaving.setdefault(name, []).append(leaving.reshape(len(leaving), -1, leaving.shape[-1]))

    def duplicates(self) -> dict[str, int]:
        """Per called layer, in the order of first call: inputs less distinct activations."""
        return {name: count_duplicates(np.concatenate(calls, 1)) for name, calls in self.entering.items()}

    def dead_units(self) -> dict[str, int]:
        """Per called layer: units whose output is one and the same number for every input, at each position."""
        joined = {name: np.concatenate(calls, 1) for name, calls in self.leaving.items()}
        return {name: int((calls == calls[:1]).all(axis=(0, 1)).sum()) for name, calls in joined.items()}


def integers(tensor: Tensor) -> np.ndarray:
    """A tensor of whole numbers as int64."""
    values = tensor.detach().double().numpy()
    assert np.array_equal(values, np.round(values))
    return values.astype(np.int64)


def count_duplicates(rows: np.ndarray) -> int:
    """Rows less distinct rows.

    Example:
        >>> count_duplicates(np.array([[1, 2], [1, 3], [1, 2]]))
        1
    """
    return len(rows) - len({tuple(row) for row in rows.reshape(len(rows), -1).tolist()})


def jacobian(outputs: Dual) -> np.ndarray:
    """Rows ordered by input, then output, shape ``(m, N)``."""
    return outputs.gradient.reshape(-1, outputs.gradient.shape[-1])


def half_squared_error_hessian(outputs: Dual, targets: np.ndarray) -> np.ndarray:
    """The Hessian of 0.5 * sum (f - y)**2: the sum of g gᵀ + (f - y) f'' over all outputs, shape ``(N, N)``."""
    assert outputs.hessian is not None
    gradients = jacobian(outputs)
    residuals = (outputs.value - targets).reshape(-1, 1, 1)
    bends = outputs.hessian.reshape(-1, *outputs.hessian.shape[-2:])
    return _bounded(gradients.T @ gradients + _product(residuals, bends).sum(0))


def relu_chain_gradients(
    weights: Sequence[np.ndarray], biases: Sequence[np.ndarray], inputs: np.ndarray
) -> list[np.ndarray]:
    """Gradients of each layer of a ReLU network, by hand-written backpropagation; for networks too large for `Dual`."""
    entering, masks, values = [], [], inputs
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if index:
            masks.append(values > 0)
            values = values * masks[-1]
        entering.append(np.concatenate([values, np.ones((len(values), 1), dtype=np.int64)], axis=1))
        values = values @ weight.T + bias
    k, c = values.shape
    signals = np.broadcast_to(np.eye(c, dtype=np.int64), (k, c, c))
    blocks = []
    for index in reversed(range(len(weights))):
        blocks.append(_bounded(signals[..., None] * entering[index][:, None, None, :]).reshape(k * c, -1))
        if index:
            signals = (signals @ weights[index]) * masks[index - 1][:, None, :]
    return blocks[::-1]


def columns_of(network: ExactNetwork, layers: Iterable[str]) -> list[int]:
    """Columns of the Jacobian that belong to some layers."""
    return [column for layer in layers for column in network.columns[layer]]
