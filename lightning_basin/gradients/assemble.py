"""The gradients of a layer, put together from the operations that use its parameters.

No gradient with respect to a parameter is taken. Whether there are other uses is for the caller to check.
Axis letters: k inputs, c outputs per input, m = k * c rows, t positions of a sequence, n elements of a parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import LayerGradients, StackedGradients
from lightning_basin.functional.jacobian import vector_jacobian_products
from lightning_basin.operations.uses import ElementwiseUse, ProductUse, Source, Use

_Part = tuple[Tensor, KhatriRaoGradients | DenseGradients]
"""Some columns of a layer's gradients: where they stand, and the gradients with respect to them."""


@dataclass(frozen=True, eq=False)
class MeasuredUse:
    """One use of a parameter, with its output gradients and input activations.

    Attributes:
        use: The operation.
        output_gradients: The output gradients, shape ``(k, c, t, d_out)`` for a product, else ``(k, c, n)``.
        activations: The input activations of a product, shape ``(k, t, d_in)``; ``None`` for other uses.
    """

    use: Use
    output_gradients: Tensor
    activations: Tensor | None


@dataclass(eq=False)
class _JoinedUses:
    """Uses of the same elements of one source in the same way, whose gradients add up.

    Attributes:
        source: The source.
        positions: The elements of the source, as in `ProductUse` or `ElementwiseUse`.
        uses: The uses.
        bias: The uses that add a bias to these products, one for each product; ``None`` where there is no bias.
    """

    source: Source
    positions: Tensor
    uses: list[MeasuredUse]
    bias: "_JoinedUses | None" = None

    def includes(self, measured: MeasuredUse) -> bool:
        """Whether another use is of the same elements in the same way."""
        use = measured.use
        return (
            use.source is self.source
            and isinstance(use, ProductUse) == isinstance(self.uses[0].use, ProductUse)
            and use.positions.numel() == self.positions.numel()
            and torch.equal(use.positions, self.positions)
        )

    def shifts(self, products: "_JoinedUses") -> bool:
        """Whether this is the bias of a product, at each of its uses."""
        shifted = [use.use.shifts if isinstance(use.use, ElementwiseUse) else None for use in self.uses]
        is_each = len(shifted) == len(products.uses) and all(map(is_, shifted, [use.use for use in products.uses]))
        return is_each and self.positions.numel() == products.positions.shape[0]

    def gradients(self) -> KhatriRaoGradients | DenseGradients:
        """Add up the gradients with respect to the elements, in the order of `columns`."""
        output_gradients = [use.output_gradients for use in self.uses]
        if self.uses[0].activations is None:
            return DenseGradients(sum(output_gradients[1:], start=output_gradients[0]).flatten(0, 1))
        activations = concatenate([use.activations for use in self.uses if use.activations is not None], 1)
        if self.bias is not None:
            activations = torch.cat([activations, activations.new_ones(*activations.shape[:2], 1)], dim=2)
        return KhatriRaoGradients(activations, concatenate(output_gradients, 2))

    def columns(self, starts: Mapping[int, int]) -> Tensor:
        """Find the places of the elements among the parameters of the layer.

        Args:
            starts: The place at which each source starts, by the identity of the source.
        """
        columns = self.positions + starts[id(self.source)]
        if self.bias is not None:
            shifted = self.bias.positions.reshape(-1, 1) + starts[id(self.bias.source)]
            columns = torch.cat([columns, shifted], dim=1)
        return columns.flatten()


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Concatenate tensors along an axis; a single tensor is not copied."""
    return torch.cat(list(tensors), dim=axis) if len(tensors) > 1 else tensors[0]


def combine_uses(parameters: Mapping[str, Tensor], measured: Sequence[MeasuredUse], *, num_rows: int) -> LayerGradients:
    """Combine all uses of a layer's parameters into its gradients.

    Uses of the same elements add up, as where a layer is called twice. Products stay factored. Elements that are used
    in several ways, as those of a table that is also the output head, are added up as dense rows.

    Args:
        parameters: The layer's parameters by name, in order, attached to the graph.
        measured: All uses of these parameters, and of tensors that were computed from them.
        num_rows: Rows of the gradients, m.
    """
    sizes = [parameter.numel() for parameter in parameters.values()]
    parts: list[_Part] = []
    joined = _joined_uses(measured)
    sources = {id(uses.source): uses.source for uses in joined}
    starts: dict[int, int] = {}
    for identity, source in sources.items():
        if source.name is None:
            parts.append(_through(source, [uses for uses in joined if uses.source is source], parameters, num_rows))
        else:
            starts[identity] = sum(sizes[: list(parameters).index(source.name)])
    direct = _with_biases([uses for uses in joined if uses.source.name is not None])
    parts += [(uses.columns(starts), uses.gradients()) for uses in direct]
    device = next(iter(parameters.values())).device
    return _side_by_side(parts, num_rows, sum(sizes), device)


def stay_factored(parameters: Mapping[str, Tensor], uses: Sequence[Use]) -> bool:
    """Whether `combine_uses` keeps the factors of a layer, and adds nothing up as dense rows.

    Args:
        parameters: The layer's parameters by name.
        uses: All uses of these parameters.
    """
    joined = _joined_uses([MeasuredUse(use, use.positions, None) for use in uses])
    return all(uses.source.name is not None for uses in joined) and all(
        _are_disjoint([uses.positions for uses in joined if uses.source.name == name], parameter.numel())
        for name, parameter in parameters.items()
    )


def _joined_uses(measured: Sequence[MeasuredUse]) -> list[_JoinedUses]:
    """Join uses of the same elements of one source."""
    joined: list[_JoinedUses] = []
    for use in measured:
        same = next((uses for uses in joined if uses.includes(use)), None)
        if same is None:
            joined.append(_JoinedUses(use.use.source, use.use.positions, [use]))
        else:
            same.uses.append(use)
    return joined


def _with_biases(joined: Sequence[_JoinedUses]) -> list[_JoinedUses]:
    """Products joined with their biases: a bias is the weight of an input activation that is always 1."""
    products = [uses for uses in joined if uses.uses[0].activations is not None]
    others = [uses for uses in joined if uses.uses[0].activations is None]
    for product in products:
        product.bias = next((uses for uses in others if uses.shifts(product)), None)
    biases = [product.bias for product in products if product.bias is not None]
    return [*products, *(uses for uses in others if not any(uses is bias for bias in biases))]


def _through(source: Source, joined: Sequence[_JoinedUses], parameters: Mapping[str, Tensor], num_rows: int) -> _Part:
    """The gradients through a tensor that was computed from parameters, as by weight normalisation: the chain rule."""
    parts = [(uses.positions.flatten(), uses.gradients()) for uses in joined]
    rows = _summed(parts, num_rows, source.tensor.numel()).view(num_rows, *source.tensor.shape)
    products = vector_jacobian_products(source.tensor, list(parameters.values()), rows.to(source.tensor.dtype))
    products = products.to(rows.dtype)
    return torch.arange(products.shape[1], device=products.device), DenseGradients(products)


def _side_by_side(parts: Sequence[_Part], num_rows: int, num_columns: int, device: torch.device) -> LayerGradients:
    """Parts of different columns stay apart; parts that overlap are added up as dense rows."""
    if _are_disjoint([columns for columns, _ in parts], num_columns):
        return StackedGradients(
            parts=tuple(gradients for _, gradients in parts),
            columns=tuple(columns for columns, _ in parts),
            num_rows=num_rows,
            num_columns=num_columns,
            device=device,
        )
    return DenseGradients(_summed(parts, num_rows, num_columns))


def _are_disjoint(columns: Sequence[Tensor], num_columns: int) -> bool:
    """Whether no column stands in two of the sets."""
    counted = sum(some.numel() for some in columns)
    if not columns or counted > num_columns:
        return not columns
    seen = torch.zeros(num_columns, dtype=torch.bool, device=columns[0].device)
    for some in columns:
        seen[some.flatten()] = True
    return int(seen.sum()) == counted


def _summed(parts: Sequence[_Part], num_rows: int, num_columns: int) -> Tensor:
    """The sum of the parts as dense rows, shape ``(m, num_columns)``."""
    rows = torch.zeros(num_rows, num_columns, dtype=parts[0][1].dtype, device=parts[0][0].device)
    for columns, gradients in parts:
        rows.index_add_(1, columns, gradients.rows())
    return rows
