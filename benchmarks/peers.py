"""Ranks and Gram matrices as one would compute them otherwise, each as its package's documentation has it.

A peer gives the gradients or their Gram matrices. The rest is `torch.linalg`: a rank is ``matrix_rank`` of the Gram
matrix, which squares the singular values; `ranks_of_singular_values` does not square.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.timing import Stages, Way

Blocks = Iterator[tuple[str, Tensor]]
"""Gradients of shape ``(m, columns)``, or Gram matrices, by the name of the layer; ``""`` is the whole network."""

_GROUP_BYTES = 2**32  # of the gradients that `vmap_jacrev` holds at once


def vmap_jacrev(module: nn.Module, inputs: Tensor) -> Blocks:
    """`torch.func`: the Jacobian on each input, batched over inputs; some layers at a time where all are too large."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, parameter in module.named_parameters():
        layers.setdefault(name.rpartition(".")[0], {})[name] = parameter.detach()

    def outputs(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(module, values, (one.unsqueeze(0),)).flatten()

    def differentiated(group: dict[str, Tensor]) -> Blocks:
        blocks = vmap(jacrev(outputs), in_dims=(None, 0))(group, inputs)
        yield from _by_layer({name: block.detach().flatten(2).flatten(0, 1) for name, block in blocks.items()})

    with torch.no_grad():
        row_bytes = module(inputs).numel() * next(module.parameters()).element_size()
    group: dict[str, Tensor] = {}
    for parameters in layers.values():
        if group and row_bytes * sum(tensor.numel() for tensor in (group | parameters).values()) > _GROUP_BYTES:
            yield from differentiated(group)
            group = {}
        group |= parameters
    yield from differentiated(group)


def vivit(module: nn.Module, inputs: Tensor) -> Blocks:
    """ViViT: the Gram matrix of the Gauss-Newton part of half a squared error, which is that of the gradients."""
    from backpack import backpack as extensions
    from backpack import extend
    from vivit.extensions.secondorder.vivit import ViViTGGNExact
    from vivit.utils.gram import reshape_as_square

    module, loss_fn, extension = extend(copy.deepcopy(module)), extend(nn.MSELoss(reduction="sum")), ViViTGGNExact()
    outputs = module(inputs)
    with extensions(extension):
        loss_fn(outputs, torch.zeros_like(outputs)).backward()
    grams: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        layer, computed = name.rpartition(".")[0], getattr(parameter, extension.savefield)["gram_mat"]()
        grams[layer] = grams.get(layer, 0) + reshape_as_square(computed).detach() / 2
    yield from grams.items()


def nngeometry(module: nn.Module, inputs: Tensor) -> Blocks:
    """nngeometry: the Gram matrix of all gradients."""
    from nngeometry import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    gram = GramMatrix(module, DataLoader(TensorDataset(inputs), batch_size=inputs.shape[0])).to_torch()
    yield "", gram.reshape(inputs.shape[0] * gram.shape[0], -1).detach()


def _by_layer(blocks: dict[str, Tensor]) -> Blocks:
    """The gradients of a layer's parameters side by side."""
    layers: dict[str, list[Tensor]] = {}
    for name in list(blocks):
        layers.setdefault(name.rpartition(".")[0], []).append(blocks.pop(name))
    while layers:
        layer = next(iter(layers))
        yield layer, torch.cat(layers.pop(layer), dim=1)


def squared_ranks(blocks: Callable[[nn.Module, Tensor], Blocks], module: nn.Module, inputs: Tensor) -> Stages:
    """Ranks of Gram matrices, which are given or formed from gradients."""
    layers: dict[str, Tensor] = {}
    total: Tensor | None = None
    for layer, block in blocks(module, inputs):
        gram = block if blocks in (vivit, nngeometry) else block @ block.mT
        total = gram.clone() if total is None else total.add_(gram)
        if layer:  # The smaller of the two matrices of products has the same rank.
            layers[layer] = gram if gram is block or block.shape[0] <= block.shape[1] else block.mT @ block
    assert total is not None
    yield "gram", total
    rank = int(torch.linalg.matrix_rank(total, hermitian=True))
    yield "rank", rank
    if layers:
        yield "layers", (rank, *(int(torch.linalg.matrix_rank(gram, hermitian=True)) for gram in layers.values()))


def ranks_of_singular_values(module: nn.Module, inputs: Tensor) -> Stages:
    """Ranks of gradients without squaring: the tolerance of `torch.linalg.matrix_rank` on their singular values."""
    blocks = dict(vmap_jacrev(module, inputs))
    rank = _rank(torch.cat(list(blocks.values()), dim=1))
    yield "rank", rank
    yield "layers", (rank, *map(_rank, blocks.values()))


def _rank(matrix: Tensor) -> int:
    """The rank by way of the triangular factor, which has the same singular values and is several times as fast."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    sigmas = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    return int((sigmas > max(matrix.shape) * torch.finfo(matrix.dtype).eps * sigmas[0]).sum())


PEERS = (
    Way("vmap(jacrev) + svdvals", ranks_of_singular_values, dtypes=(torch.float64,), num_matrices=3),
    Way("vmap(jacrev)", partial(squared_ranks, vmap_jacrev)),
    Way("nngeometry", partial(squared_ranks, nngeometry), "nngeometry"),
    Way("ViViT", partial(squared_ranks, vivit), "vivit-for-pytorch"),
)
