"""The floor under a Gram matrix: the matrix products that it is made of, counted and timed alone."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.timing import Stages, Way

_TIMED_OPERATIONS = 2e9  # of a product that is timed; a larger one is cut, and its time scaled

MATRIX_PRODUCTS = "its matrix products alone"


@dataclass(frozen=True)
class Product:
    """A batch of products of matrices, ``rows x inner`` by ``inner x columns``."""

    batch: int
    rows: int
    inner: int
    columns: int
    is_symmetric: bool = False

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.batch * self.rows * self.inner * self.columns

    @property
    def least_operations(self) -> float:
        """The same, where a symmetric result is formed once."""
        return self.operations / 2 if self.is_symmetric else self.operations

    def seconds(self, dtype: torch.dtype) -> float:
        """Of one run after another, each on as much as is quickly done."""
        cut = self._cut()
        shape = (cut.batch,) if cut.batch > 1 else ()
        left = torch.ones(*shape, cut.rows, cut.inner, dtype=dtype)
        right = torch.ones(*shape, cut.inner, cut.columns, dtype=dtype)
        result = left @ right
        started = time.perf_counter()
        torch.matmul(left, right, out=result)
        return (time.perf_counter() - started) * self.operations / cut.operations

    def _cut(self) -> "Product":
        cut = self
        while cut.operations > _TIMED_OPERATIONS:
            longest = max(("batch", "rows", "inner", "columns"), key=lambda axis: getattr(cut, axis))
            cut = replace(cut, **{longest: -(-getattr(cut, longest) // 2)})
        return cut


def gram_products(module: nn.Module, inputs: Tensor) -> list[Product]:
    """What the Gram matrix of all gradients needs: forward, one backward pass for each output, products of rows.

    Layers other than linear ones, convolutions and embeddings are left out: they are small.
    """
    found: list[Product] = []
    calls: list[tuple[nn.Module, int]] = []

    def note(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        width = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
        calls.append((layer, output.numel() // inputs.shape[0] // width))

    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    handles = [layer.register_forward_hook(note) for layer in module.modules() if isinstance(layer, kinds)]
    try:
        with torch.no_grad():
            num_outputs = module(inputs).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    for index, (layer, positions) in enumerate(calls):
        found += _of_layer(layer, inputs.shape[0], num_outputs, positions, is_first=index == 0)
    return found


def _of_layer(
    layer: nn.Module, num_inputs: int, num_outputs: int, positions: int, *, is_first: bool
) -> Iterator[Product]:
    k, m, t = num_inputs, num_inputs * num_outputs, positions
    d_out, *rest = layer.weight.shape
    d_in = torch.Size(rest).numel()
    if isinstance(layer, nn.Embedding):
        yield Product(1, m, d_out * d_in, m, is_symmetric=True)
        return
    yield Product(1, k * t, d_in, d_out)
    if not is_first:
        yield Product(1, m * t, d_out, d_in)
    entering = d_in + (layer.bias is not None)
    if t == 1:
        yield Product(1, m, d_out, m, is_symmetric=True)
        yield Product(1, k, entering, k, is_symmetric=True)
    else:
        yield Product(k, num_outputs * d_out, t, entering)
        yield Product(1, m, d_out * entering, m, is_symmetric=True)


def matrix_products(module: nn.Module, inputs: Tensor) -> Stages:
    """Count them, and time each shape once."""
    products = gram_products(module, inputs)
    dtype = next(module.parameters()).dtype
    seconds = {product: product.seconds(dtype) for product in set(products)}
    yield (
        "floor",
        {
            "seconds": sum(seconds[product] for product in products),
            "operations": sum(product.operations for product in products),
            "least_operations": sum(product.least_operations for product in products),
        },
    )


FLOOR = Way(MATRIX_PRODUCTS, matrix_products)
