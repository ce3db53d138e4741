"""The gradients of a layer, put together from the operations that use its parameters.

No gradient with respect to a parameter is taken. Whether there are other uses is for the caller to check.
Axis letters: k inputs, c outputs per input, m = k * c rows, t positions of a sequence, n elements of a parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import is_

import torch
from torch import Tensor

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import Block, Columns, LayerGradients, StackedGradients, add_columns
from lightning_basin.functional.jacobian import vector_jacobian_products
from lightning_basin.operations.uses import Elements, ElementwiseUse, ProductUse, Source, Use
from lightning_basin.tensors import as_result, float64_device

_Part = tuple[Columns, KhatriRaoGradients | DenseGradients]
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
        elements: The elements of the source, as in `ProductUse` or `ElementwiseUse`.
        bias: The uses that add a bias to these products, one for each product; ``None`` where there is no bias.
    """

    source: Source
    elements: Elements
    uses: list[MeasuredUse]
    bias: "_JoinedUses | None" = None

    def includes(self, measured: MeasuredUse) -> bool:
        """Whether another use is of the same elements in the same way."""
        use = measured.use
        return (
            use.source is self.source
            and isinstance(use, ProductUse) == isinstance(self.uses[0].use, ProductUse)
            and use.elements.is_same(self.elements)
        )

    def shifts(self, products: "_JoinedUses") -> bool:
        """Whether this is the bias of a product, at each of its uses."""
        shifted = [use.use.shifts if isinstance(use.use, ElementwiseUse) else None for use in self.uses]
        is_each = len(shifted) == len(products.uses) and all(map(is_, shifted, [use.use for use in products.uses]))
        return is_each and self.elements.count == products.elements.shape[0]

    def gradients(self) -> KhatriRaoGradients | DenseGradients:
        """Add up the gradients with respect to the elements, in the order of `columns`."""
        output_gradients = [use.output_gradients for use in self.uses]
        if self.uses[0].activations is None:
            return DenseGradients(sum(output_gradients[1:], start=output_gradients[0]).flatten(0, 1))
        activations = concatenate([use.activations for use in self.uses if use.activations is not None], 1)
        if self.bias is not None:
            activations = torch.cat([activations, activations.new_ones(*activations.shape[:2], 1)], dim=2)
        return KhatriRaoGradients(activations, concatenate(output_gradients, 2))

    def columns(self, starts: Mapping[int, int]) -> Columns:
        """Find the places of the elements among the parameters of the layer."""
        joined = [self] if self.bias is None else [self, self.bias]
        if all(map(_is_block, joined)):
            return tuple(
                Block(uses.elements.sizes, uses.elements.strides, starts[id(uses.source)] + uses.elements.offset)
                for uses in joined
            )
        num_rows = self.elements.shape[0]
        columns = [
            uses.elements.positions(uses.source.tensor).reshape(num_rows, -1) + starts[id(uses.source)]
            for uses in joined
        ]
        return concatenate(columns, 1).flatten()


@dataclass(eq=False)
class _Table:
    """A table of which some rows are looked up, while all of them are factors of products, as of a tied output head.

    Attributes:
        looked_up: The rows that are looked up, as the columns of a matrix.
        lookups: The uses of these rows, or of some of them.
        products: The uses of all rows, one for each output of the products.
    """

    looked_up: Elements
    lookups: list[_JoinedUses]
    products: list[_JoinedUses]

    def parts(self, starts: Mapping[int, int]) -> list[_Part]:
        """The gradients: dense by the rows that are looked up, and by products, which are zero in these rows."""
        parts: list[_Part] = []
        summed: Tensor | None = None
        rows, (width, num_rows) = _rows_of(self.looked_up), self.looked_up.shape
        for product in self.products:
            factors = product.gradients()
            assert isinstance(factors, KhatriRaoGradients), "a product has factors"
            signals = factors.output_gradients
            of_rows = (
                replace(factors, output_gradients=signals[..., rows]).rows().view(factors.num_rows, num_rows, width)
            )
            summed = of_rows if summed is None else summed.add_(of_rows)
            others = replace(factors, output_gradients=signals.index_fill(-1, rows, 0.0))
            parts.append((product.columns(starts), others))
        assert summed is not None, "a table has products"
        for lookup in self.lookups:
            values = lookup.gradients().rows().view(len(summed), width, -1).mT
            summed.index_add_(1, torch.searchsorted(rows, _rows_of(lookup.elements)), values)
        source = self.products[0].source
        places = self.looked_up.positions(source.tensor).mT.flatten() + starts[id(source)]
        return [*parts, (places, DenseGradients(summed.flatten(1)))]


def _rows_of(elements: Elements) -> Tensor:
    """The rows of elements that are looked up, on the device of the gradients."""
    assert elements.rows is not None, "elements that are looked up are rows"
    return elements.rows.to(float64_device(elements.rows.device))


def _is_block(uses: _JoinedUses) -> bool:
    """Whether elements stand in the same order in storage as among the parameters, each once."""
    elements = uses.elements
    return elements.rows is None and elements.span is not None and uses.source.tensor.is_contiguous()


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Concatenate tensors along an axis; a single tensor is not copied."""
    return torch.cat(list(tensors), dim=axis) if len(tensors) > 1 else tensors[0]


def combine_uses(parameters: Mapping[str, Tensor], measured: Sequence[MeasuredUse], *, num_rows: int) -> LayerGradients:
    """Combine all uses of a layer's parameters into its gradients.

    Uses of the same elements add up, as where a layer is called twice. Products stay factored. Elements that are used
    in several ways are added up as dense rows: of a table that is also the output head, the rows that are looked up.
    """
    sizes = [parameter.numel() for parameter in parameters.values()]
    parts: list[_Part] = []
    tables, joined = _split_tables(_joined_uses(measured))
    is_disjoint = _are_disjoint(joined)
    sources = {id(measured_use.use.source): measured_use.use.source for measured_use in measured}
    starts: dict[int, int] = {}
    for identity, source in sources.items():
        if source.name is None:
            parts.append(_through(source, [uses for uses in joined if uses.source is source], parameters, num_rows))
        else:
            starts[identity] = sum(sizes[: list(parameters).index(source.name)])
    direct = _with_biases([uses for uses in joined if uses.source.name is not None])
    parts += [(uses.columns(starts), uses.gradients()) for uses in direct]
    parts += [part for table in tables for part in table.parts(starts)]
    device = float64_device(next(iter(parameters.values())).device)
    if not is_disjoint:
        return DenseGradients(_summed(parts, num_rows, sum(sizes)))
    return StackedGradients(
        parts=tuple(gradients for _, gradients in parts),
        columns=tuple(columns for columns, _ in parts),
        num_rows=num_rows,
        num_columns=sum(sizes),
        device=device,
    )


def num_summed_columns(parameters: Mapping[str, Tensor], uses: Sequence[Use]) -> int:
    """Return the number of columns that `combine_uses` adds up as dense rows; 0 where all uses stay factored."""
    tables, joined = _split_tables(_joined_uses([MeasuredUse(use, use.source.tensor, None) for use in uses]))
    if any(uses.source.name is None for uses in joined) or not _are_disjoint(joined):
        return sum(parameter.numel() for parameter in parameters.values())
    return sum(table.looked_up.count for table in tables)


def _joined_uses(measured: Sequence[MeasuredUse]) -> list[_JoinedUses]:
    """Join uses of the same elements of one source."""
    joined: list[_JoinedUses] = []
    for use in measured:
        same = next((uses for uses in joined if uses.includes(use)), None)
        if same is None:
            joined.append(_JoinedUses(use.use.source, use.use.elements, [use]))
        else:
            same.uses.append(use)
    return joined


def _split_tables(joined: Sequence[_JoinedUses]) -> tuple[list[_Table], list[_JoinedUses]]:
    """Split the tables that are looked up and multiplied from all other uses."""
    by_source: dict[int, list[_JoinedUses]] = {}
    for uses in joined:
        by_source.setdefault(id(uses.source), []).append(uses)
    tables = {identity: table for identity, uses in by_source.items() if (table := _table_of(uses)) is not None}
    return list(tables.values()), [uses for uses in joined if id(uses.source) not in tables]


def _table_of(joined: Sequence[_JoinedUses]) -> _Table | None:
    """All uses of a parameter as those of a table; ``None`` where it is no table, or where all rows are looked up."""
    lookups = [uses for uses in joined if uses.elements.rows is not None]
    products = [uses for uses in joined if uses.elements.rows is None]
    if not lookups or not products or joined[0].source.name is None:
        return None
    first = lookups[0].elements
    are_of_rows = all(isinstance(uses.uses[0].use, ProductUse) for uses in products)
    shapes = {uses.elements.shape for uses in products} | {uses.elements.sizes for uses in joined}
    views = {(uses.elements.strides, uses.elements.offset) for uses in joined}
    if not are_of_rows or shapes != {first.sizes} or len(views) > 1 or len(first.sizes) != 2:  # noqa: PLR2004 - a matrix
        return None
    rows = torch.unique(torch.cat([_rows_of(uses.elements) for uses in lookups]))
    if len(rows) == first.sizes[0]:
        return None
    return _Table(replace(first, shape=(first.sizes[1], len(rows)), rows=rows), lookups, products)


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
    parts = [(uses.columns({id(source): 0}), uses.gradients()) for uses in joined]
    rows = _summed(parts, num_rows, source.tensor.numel()).view(num_rows, *source.tensor.shape)
    products = vector_jacobian_products(source.tensor, list(parameters.values()), rows.to(source.tensor))
    products = as_result(products, rows.dtype)
    return (Block((products.shape[1],), (1,), 0),), DenseGradients(products)


def _are_disjoint(joined: Sequence[_JoinedUses]) -> bool:
    """Whether no element of a parameter is used in two ways. A computed tensor depends on all elements alike."""
    if any(uses.source.name is None for uses in joined):
        return len({id(uses.source) for uses in joined}) == 1
    by_source: dict[int, list[_JoinedUses]] = {}
    for uses in joined:
        by_source.setdefault(id(uses.source), []).append(uses)
    return all(_are_apart(uses[0].source.tensor, [some.elements for some in uses]) for uses in by_source.values())


def _are_apart(source: Tensor, uses: Sequence[Elements]) -> bool:
    """Whether no element of a source is used twice, decided without the device where each use is of a range."""
    counted = sum(elements.count for elements in uses)
    if counted > source.numel():
        return False
    spans = sorted((span.start, span.stop) for elements in uses if (span := elements.span) is not None)
    if len(spans) == len(uses) and all(stop <= start for (_, stop), (start, _) in pairwise(spans)):
        return True
    seen = torch.zeros(source.numel(), dtype=torch.bool, device=source.device)
    for elements in uses:
        seen[elements.positions(source).flatten()] = True
    return int(seen.sum()) == counted


def _summed(parts: Sequence[_Part], num_rows: int, num_columns: int) -> Tensor:
    """The sum of the parts as dense rows, shape ``(m, num_columns)``."""
    rows = torch.zeros(num_rows, num_columns, dtype=parts[0][1].dtype, device=parts[0][1].device)
    for columns, gradients in parts:
        add_columns(rows, columns, gradients.rows())
    return rows
