"""What users would pick today, each as its documentation has it.

A peer gives the gradients of each layer, or their Gram matrices; the rest is what `torch.linalg` offers: a rank is
``matrix_rank`` of the Gram matrix with its default tolerance, which squares; only the last way does not square.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.timing import Stages, Way

Blocks = Iterator[tuple[str, Tensor]]
"""For each layer its gradients ``(m, N_layer)`` or Gram matrix ``(m, m)``; "" stands for the whole network."""

GROUP_BYTES = 2**32  # of the layers that `vmap_jacrev_in_groups` differentiates together
CHUNK_COLUMNS = 128  # of the identity that curvlinops is multiplied with at once


def vmap_jacrev(module: nn.Module, inputs: Tensor) -> Blocks:
    """`torch.func`: the Jacobian on each input, batched over inputs."""
    yield from _by_layer(_jacobians(module, inputs, [name for name, _ in module.named_parameters()]))


def vmap_jacrev_in_groups(module: nn.Module, inputs: Tensor) -> Blocks:
    """The same for some layers after the other, where all together do not fit into memory."""
    with torch.no_grad():
        num_rows = module(inputs).numel()
    layers: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    group: list[str] = []
    for names in layers.values():
        entries = sum(module.get_parameter(name).numel() for name in group + names)
        if group and entries * num_rows * inputs.element_size() > GROUP_BYTES:
            yield from _by_layer(_jacobians(module, inputs, group))
            group = []
        group += names
    yield from _by_layer(_jacobians(module, inputs, group))


def laplace(module: nn.Module, inputs: Tensor) -> Blocks:
    """laplace-torch with its default backend: the Jacobian of the whole batch."""
    from laplace.curvature import CurvlinopsGGN

    yield "", CurvlinopsGGN(module, "regression").jacobians(inputs)[0].flatten(0, 1)


def curvlinops(module: nn.Module, inputs: Tensor) -> Blocks:
    """curvlinops: the transposed Jacobian as a linear operator, times the identity."""
    from curvlinops import TransposedJacobianLinearOperator

    with torch.no_grad():
        outputs = module(inputs)
    data = [(inputs, outputs)]
    operator = TransposedJacobianLinearOperator(module, list(module.parameters()), data, check_deterministic=False)
    identity = torch.eye(outputs.numel(), dtype=outputs.dtype)
    columns = [operator @ chunk for chunk in identity.split(CHUNK_COLUMNS, dim=1)]
    yield "", torch.cat(columns, dim=1).mT


def backpack(module: nn.Module, inputs: Tensor) -> Blocks:
    """BackPACK: gradients of every input for one output after the other."""
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import BatchGrad

    module = extend(copy.deepcopy(module))
    found: dict[str, list[Tensor]] = {name: [] for name, _ in module.named_parameters()}
    for index in range(module(inputs[:1]).shape[1]):
        module.zero_grad()
        with extensions(BatchGrad()):
            module(inputs)[:, index].sum().backward()
        for name, parameter in module.named_parameters():
            found[name].append(parameter.grad_batch.flatten(1))
    yield from _by_layer((name, torch.cat(columns)) for name, columns in found.items())


def vivit(module: nn.Module, inputs: Tensor) -> Blocks:
    """ViViT: the Gram matrix of the Gauss-Newton part of half a squared error, which is that of the gradients."""
    from backpack import backpack as extensions
    from backpack import extend
    from vivit.extensions.secondorder.vivit import ViViTGGNExact
    from vivit.utils.gram import reshape_as_square

    module, loss_fn = extend(copy.deepcopy(module)), extend(nn.MSELoss(reduction="sum"))
    outputs = module(inputs)
    extension = ViViTGGNExact(subsampling=None)
    with extensions(extension):
        loss_fn(outputs, torch.zeros_like(outputs)).backward()
    grams: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        layer = name.rpartition(".")[0]
        found = reshape_as_square(getattr(parameter, extension.savefield)["gram_mat"]()).detach() / 2
        grams[layer] = grams[layer] + found if layer in grams else found
    yield from grams.items()


def nngeometry(module: nn.Module, inputs: Tensor) -> Blocks:
    """nngeometry: the Gram matrix of all gradients."""
    from nngeometry import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    gram = GramMatrix(module, DataLoader(TensorDataset(inputs), batch_size=inputs.shape[0])).to_torch()
    yield "", gram.reshape(inputs.shape[0] * gram.shape[0], -1).detach()


def _jacobians(module: nn.Module, inputs: Tensor, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    parameters = {name: module.get_parameter(name).detach() for name in names}

    def outputs(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(module, values, (one.unsqueeze(0),)).flatten()

    blocks = vmap(jacrev(outputs), in_dims=(None, 0))(parameters, inputs)
    return iter([(name, block.detach().flatten(2).flatten(0, 1)) for name, block in blocks.items()])


def _by_layer(blocks: Iterator[tuple[str, Tensor]]) -> Blocks:
    """Parameters of one layer side by side."""
    together: dict[str, list[Tensor]] = {}
    for name, block in blocks:
        together.setdefault(name.rpartition(".")[0], []).append(block)
    while together:
        layer = next(iter(together))
        yield layer, torch.cat(together.pop(layer), dim=1)


def ranks_of_gradients(gradients: Callable[[nn.Module, Tensor], Blocks], module: nn.Module, inputs: Tensor) -> Stages:
    """Of dense gradients by their Gram matrices."""
    found: dict[str, Tensor] = {}
    total: Tensor | None = None
    for layer, block in gradients(module, inputs):
        gram = block @ block.mT
        total = gram.clone() if total is None else total.add_(gram)
        if layer:  # The smaller of the two matrices of products has the same rank.
            found[layer] = gram if block.shape[0] <= block.shape[1] else block.mT @ block
    yield from _ranks_of_grams(total, found)


def ranks_of_grams(grams: Callable[[nn.Module, Tensor], Blocks], module: nn.Module, inputs: Tensor) -> Stages:
    """Of Gram matrices."""
    found = dict(grams(module, inputs))
    total = torch.stack(list(found.values())).sum(0) if len(found) > 1 else next(iter(found.values()))
    found.pop("", None)
    yield from _ranks_of_grams(total, found)


def _ranks_of_grams(total: Tensor | None, layers: dict[str, Tensor]) -> Stages:
    yield "gram", total
    assert total is not None
    rank = int(torch.linalg.matrix_rank(total, hermitian=True))
    yield "rank", rank
    if layers:
        yield "layers", (rank, *(int(torch.linalg.matrix_rank(gram, hermitian=True)) for gram in layers.values()))


def ranks_of_singular_values(module: nn.Module, inputs: Tensor) -> Stages:
    """Of dense gradients without squaring: the tolerance of `torch.linalg.matrix_rank` on their singular values."""
    blocks = dict(vmap_jacrev(module, inputs))
    rank = _rank(torch.cat(list(blocks.values()), dim=1))
    yield "rank", rank
    yield "layers", (rank, *map(_rank, blocks.values()))


def _rank(matrix: Tensor) -> int:
    """By way of the triangular factor, which has the same singular values: several times as fast."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    sigmas = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    return int((sigmas > max(matrix.shape) * torch.finfo(matrix.dtype).eps * sigmas[0]).sum())


SINGULAR_VALUES = "vmap(jacrev) + svdvals"
DENSE = ("vmap(jacrev)", "vmap(jacrev) in groups", "BackPACK", "curvlinops", "laplace")
"""The ways that form the gradients."""

_LARGE = 3e11  # operations of the products of all pairs of rows
_SINGLE = (torch.float32,)
_PATIENCE = 20.0  # with what forms the same matrix as vmap(jacrev)

PEERS = (
    Way(SINGULAR_VALUES, ranks_of_singular_values, dtypes=(torch.float64,), num_matrices=3, max_work=_LARGE),
    Way("vmap(jacrev)", partial(ranks_of_gradients, vmap_jacrev), num_matrices=2),
    Way("vmap(jacrev) in groups", partial(ranks_of_gradients, vmap_jacrev_in_groups), _SINGLE, only=("resnet",)),
    Way("nngeometry", partial(ranks_of_grams, nngeometry), package="nngeometry"),
    Way("ViViT", partial(ranks_of_grams, vivit), package="vivit-for-pytorch"),
    Way(
        "BackPACK",
        partial(ranks_of_gradients, backpack),
        _SINGLE,
        package="backpack-for-pytorch",
        num_matrices=2,
        max_work=_LARGE,
        patience=_PATIENCE,
        is_quick=False,
    ),
    Way(
        "curvlinops",
        partial(ranks_of_gradients, curvlinops),
        _SINGLE,
        package="curvlinops-for-pytorch",
        num_matrices=2,
        max_work=_LARGE,
        patience=_PATIENCE,
        is_quick=False,
    ),
    Way(
        "laplace",
        partial(ranks_of_gradients, laplace),
        _SINGLE,
        package="laplace-torch",
        num_matrices=6,
        max_work=_LARGE,
        patience=_PATIENCE,
        is_quick=False,
    ),
)
