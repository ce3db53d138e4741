"""The three quantities as torchmetrics objects, for plain loops and several processes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_basin.functional.duplicates import duplicated_activations
from lightning_basin.functional.null_space import hessian_nullity
from lightning_basin.functional.rank import check_rtol
from lightning_basin.functional.spectrum import behavioral_gradient_rank


class _Count(Metric):
    """A number of dimensions or of inputs: at least 0, and no gradient."""

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    plot_lower_bound = 0.0

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one or several values, as every `torchmetrics.Metric` does."""
        return self._plot(val, ax)


class _CountOfRows(_Count):
    """A count over all rows that came in batches."""

    rows: list[Tensor]

    def __init__(self, num_columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._num_columns = num_columns
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes, also of those that have none."""
        self.rows = _never_empty(self.rows, self._num_columns)
        super().sync(*args, **kwargs)

    def _all_rows(self) -> Tensor:
        """Return the rows, which are a list before the processes are synchronized, and a tensor after."""
        return self.rows if isinstance(self.rows, Tensor) else torch.cat(_never_empty(self.rows, self._num_columns))


class BehavioralGradientRank(_CountOfRows):
    """The rank of behavioral gradients collected over batches; the functional twin is `behavioral_gradient_rank`.

    Args:
        num_parameters: The number of columns of the gradients, N.
        rtol: The relative tolerance of singular values; ``None`` means ``max(m, N) * eps`` of float64.
        kwargs: Keyword arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_parameters`` is not positive, or ``rtol`` not inside ``(0, 1)``.

    Example:
        >>> metric = BehavioralGradientRank(num_parameters=2)
        >>> metric.update(torch.tensor([[1.0, 2.0]]))
        >>> metric.update(torch.tensor([[2.0, 4.0]]))
        >>> metric.compute()
        tensor(1)
    """

    def __init__(self, num_parameters: int, *, rtol: float | None = None, **kwargs: Any) -> None:
        _check_positive("num_parameters", num_parameters)
        check_rtol(rtol)
        super().__init__(num_parameters, **kwargs)
        self.num_parameters = num_parameters
        self.rtol = rtol

    def update(self, gradients: Tensor) -> None:
        """Add rows.

        Args:
            gradients: The gradients, one row per output of one input, shape ``(rows, N)``, all at the same weights.

        Raises:
            ValueError: If the tensor has another shape.
        """
        self.rows.append(_checked(gradients, "gradients", self.num_parameters))

    def compute(self) -> Tensor:
        """Return the rank, int64, shape ``()``."""
        return torch.tensor(behavioral_gradient_rank(self._all_rows(), rtol=self.rtol))


class HessianNullity(_Count):
    """The number of zero eigenvalues of a Hessian averaged over batches; the functional twin is `hessian_nullity`.

    Args:
        num_parameters: The number of rows and columns of the Hessian, N.
        rtol: The tolerance relative to the eigenvalue of largest magnitude; ``None`` means ``N * eps`` of float64.
        kwargs: Keyword arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_parameters`` is not positive, or ``rtol`` not inside ``(0, 1)``.

    Example:
        >>> metric = HessianNullity(num_parameters=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), num_inputs=3)
        >>> metric.update(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), num_inputs=1)
        >>> metric.compute()
        tensor(1)
    """

    weighted_sum: Tensor
    num_inputs: Tensor

    def __init__(self, num_parameters: int, *, rtol: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_positive("num_parameters", num_parameters)
        check_rtol(rtol)
        self.num_parameters = num_parameters
        self.rtol = rtol
        zeros = torch.zeros(num_parameters, num_parameters, dtype=torch.float64)
        self.add_state("weighted_sum", default=zeros, dist_reduce_fx="sum")
        self.add_state("num_inputs", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, hessian: Tensor, num_inputs: int = 1) -> None:
        """Add the Hessian of the mean loss of a batch.

        Args:
            hessian: The Hessian, symmetric, shape ``(N, N)``.
            num_inputs: The number of inputs in the batch: a short last batch weighs less.

        Raises:
            ValueError: If the tensor has another shape, or ``num_inputs`` is not positive.
        """
        _check_positive("num_inputs", num_inputs)
        hessian = _checked(hessian, "hessian", self.num_parameters)
        if hessian.shape[0] != self.num_parameters:
            raise ValueError(f"hessian must be square, got shape {tuple(hessian.shape)}")
        self.weighted_sum = self.weighted_sum + num_inputs * hessian
        self.num_inputs = self.num_inputs + num_inputs

    def compute(self) -> Tensor:
        """Return the nullity, int64, shape ``()``."""
        return torch.tensor(hessian_nullity(self.weighted_sum / self.num_inputs.clamp(min=1), rtol=self.rtol))


class DuplicatedActivations(_CountOfRows):
    """The number of inputs with the activation of an earlier one; the functional twin is `duplicated_activations`.

    Args:
        num_features: The number of elements of one activation, d.
        rtol: The relative tolerance within which two activations are the same; 0 asks for equality.
        kwargs: Keyword arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_features`` is not positive, or ``rtol`` not inside ``[0, 1)``.

    Example:
        >>> metric = DuplicatedActivations(num_features=1)
        >>> metric.update(torch.tensor([[1.0], [2.0]]))
        >>> metric.update(torch.tensor([[2.0]]))
        >>> metric.compute()
        tensor(1)
    """

    higher_is_better = False

    def __init__(self, num_features: int, *, rtol: float = 1e-6, **kwargs: Any) -> None:
        _check_positive("num_features", num_features)
        if not 0.0 <= rtol < 1.0:
            raise ValueError(f"rtol must be inside [0, 1), got {rtol}")
        super().__init__(num_features, **kwargs)
        self.num_features = num_features
        self.rtol = rtol

    def update(self, activations: Tensor) -> None:
        """Add activations.

        Args:
            activations: The activations, one row per input, shape ``(k, d)``.

        Raises:
            ValueError: If the tensor has another shape.
        """
        self.rows.append(_checked(activations, "activations", self.num_features))

    def compute(self) -> Tensor:
        """Return the number of duplicates, int64, shape ``()``."""
        return torch.tensor(duplicated_activations(self._all_rows(), rtol=self.rtol))


def _check_positive(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def _checked(rows: Tensor, name: str, num_columns: int) -> Tensor:
    if rows.ndim != 2 or rows.shape[1] != num_columns:  # noqa: PLR2004 - a matrix
        raise ValueError(f"{name} must be a matrix with {num_columns} columns, got shape {tuple(rows.shape)}")
    return rows.detach().to(torch.float64, copy=True)


def _never_empty(rows: list[Tensor], num_columns: int) -> list[Tensor]:
    # torchmetrics 1.9 gathers a vector from a process without rows, where gloo needs a matrix, and aborts.
    return rows or [torch.empty(0, num_columns, dtype=torch.float64)]
