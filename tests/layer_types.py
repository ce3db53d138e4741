"""A small network around every type of layer, in torch and over exact numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from tests import exact_layers as exact
from tests.exact import DIGITS, Dual, ExactNetwork, exact_rank, integers, rank_of_decimals, rank_of_fractions
from tests.models import integer_inputs, tokens


class Headed(nn.Module):
    """A linear layer over the last axis, a layer of some type, ReLU, and a linear head; token indices go in as such."""

    def __init__(self, part: nn.Module, rule: Callable[..., Dual], call: Callable[..., Tensor], inputs: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(inputs.shape[-1], inputs.shape[-1]) if inputs.is_floating_point() else None
        self.part, self.rule, self.call = part, rule, call
        with torch.no_grad():
            width = self.inner(inputs).shape[1]
        self.head = nn.Linear(width, 2)

    def inner(self, x: Tensor) -> Tensor:
        return self.call(self.part, x if self.first is None else self.first(x)).relu().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))

    def exact(self, network: ExactNetwork, inputs: Tensor) -> Dual:
        if self.first is None:
            left = self.rule(network, "part", self.part, integers(inputs))
        else:
            entering = network.linear("first", network.constant(network.numbers(inputs)))
            left = self.rule(network, "part", self.part, entering)
        return network.linear("head", left.relu().reshape(len(inputs), -1))


@dataclass(frozen=True)
class LayerType:
    """How a type of layer is built, computed exactly, fed and called."""

    build: Callable[[], nn.Module]
    rule: Callable[..., Dual]
    shape: tuple[int, ...]
    number: type = int
    call: Callable[..., Tensor] = lambda part, x: part(x)
    vocabulary: int = 0

    def inputs(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return tokens(generator, *self.shape, vocabulary=self.vocabulary)
        return integer_inputs(generator, *self.shape)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 2))
        self.positions = nn.Parameter(torch.zeros(1, 3, 2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions) * self.scale


class Tied(nn.Module):
    """The table of tokens is the output head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 2), nn.Linear(2, 4)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).sum(1).relu())


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.inner(x).relu()
        return x


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mT


def frozen(part: nn.Module, *names: str) -> nn.Module:
    for name in names:
        part.get_parameter(name).requires_grad_(requires_grad=False)
    return part


def initialised(part: nn.Module, *shape: int) -> nn.Module:
    """After first use, as a lazily built module needs it."""
    part(torch.zeros(shape))
    return part


def checkpointed(part: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=False)


def first_output(part: nn.Module, x: Tensor) -> Tensor:
    return part(x)[0]


def negated(part: nn.Module, x: Tensor) -> Tensor:
    """So that the negative side of a PReLU passes the ReLU behind it."""
    return -part(x)


def to_itself(part: nn.Module, x: Tensor) -> Tensor:
    return part(x, x, x)[0]


def halves(part: nn.Bilinear, x: Tensor) -> Tensor:
    return part(x[:, : part.in1_features], x[:, part.in1_features :])


TYPES: dict[str, LayerType] = {
    "Linear": LayerType(lambda: nn.Linear(3, 3), exact.linear, (8, 3)),
    "Linear over leading axes": LayerType(lambda: nn.Linear(2, 2), exact.linear, (6, 2, 3, 2)),
    "Linear called several times": LayerType(Repeated, exact.repeated, (9, 3)),
    "Linear, lazily built": LayerType(lambda: initialised(nn.LazyLinear(4), 1, 3), exact.linear, (8, 3)),
    "Linear, checkpointed": LayerType(Repeated, exact.repeated, (9, 3), call=checkpointed),
    "Linear, weight frozen": LayerType(lambda: frozen(nn.Linear(3, 3), "weight"), exact.linear, (8, 3)),
    "Linear, parametrized": LayerType(
        lambda: parametrize.register_parametrization(nn.Linear(3, 3), "weight", Symmetric()), exact.symmetric, (8, 3)
    ),
    "Bilinear": LayerType(lambda: nn.Bilinear(2, 2, 2), exact.bilinear, (9, 4), call=halves),
    "Conv1d": LayerType(
        lambda: nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2), exact.convolution, (6, 2, 5)
    ),
    "Conv2d": LayerType(
        lambda: nn.Conv2d(2, 2, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2)), exact.convolution, (5, 2, 3, 5)
    ),
    "Conv2d, depthwise": LayerType(lambda: nn.Conv2d(2, 2, 2, groups=2, bias=False), exact.convolution, (6, 2, 3, 3)),
    "Conv3d": LayerType(
        lambda: nn.Conv3d(2, 2, 2, stride=(2, 1, 2), padding=(1, 0, 1), groups=2), exact.convolution, (4, 2, 2, 2, 3)
    ),
    "ConvTranspose1d": LayerType(
        lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1, output_padding=1, groups=2),
        exact.transposed_convolution,
        (6, 2, 3),
    ),
    "ConvTranspose2d": LayerType(
        lambda: nn.ConvTranspose2d(2, 1, 2, stride=(1, 3), dilation=(2, 1)), exact.transposed_convolution, (5, 2, 2, 2)
    ),
    "ConvTranspose3d": LayerType(
        lambda: nn.ConvTranspose3d(1, 2, 2, stride=(1, 2, 1), bias=False), exact.transposed_convolution, (4, 1, 2, 2, 2)
    ),
    "Embedding": LayerType(lambda: nn.Embedding(4, 2), exact.embedding, (7, 3), vocabulary=4),
    "Embedding with padding": LayerType(
        lambda: nn.Embedding(4, 2, padding_idx=1), exact.embedding, (7, 3), vocabulary=4
    ),
    "EmbeddingBag, sums": LayerType(lambda: nn.EmbeddingBag(5, 2, mode="sum"), exact.bag, (8, 3), vocabulary=5),
    "EmbeddingBag, means": LayerType(
        lambda: nn.EmbeddingBag(5, 2, mode="mean"), exact.bag, (8, 3), number=Fraction, vocabulary=5
    ),
    "tied table and head": LayerType(Tied, exact.tied_head, (8, 3), vocabulary=4),
    "bare parameters": LayerType(Bare, exact.positions_and_token, (8, 2, 2)),
    "PReLU": LayerType(lambda: nn.PReLU(), exact.negated_prelu, (8, 3), call=negated),
    "PReLU by channel": LayerType(lambda: nn.PReLU(3), exact.negated_prelu, (6, 3, 2), call=negated),
    "BatchNorm1d": LayerType(lambda: nn.BatchNorm1d(3, eps=1.0), exact.batch_norm, (8, 3), number=Fraction),
    "BatchNorm2d": LayerType(lambda: nn.BatchNorm2d(2, eps=1.0), exact.batch_norm, (6, 2, 2, 2), number=Fraction),
    "weight_norm": LayerType(
        lambda: parametrizations.weight_norm(nn.Linear(2, 3)), exact.weight_normalised, (8, 2), number=Fraction
    ),
    "spectral_norm": LayerType(
        lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), exact.spectrally_normalised, (8, 3), number=Fraction
    ),
    "LayerNorm": LayerType(lambda: nn.LayerNorm(3), exact.layer_norm, (6, 2, 3), number=Decimal),
    "RMSNorm": LayerType(lambda: nn.RMSNorm(3, eps=1e-5), exact.rms_norm, (8, 3), number=Decimal),
    "GroupNorm": LayerType(lambda: nn.GroupNorm(2, 4), exact.group_norm, (6, 4, 2), number=Decimal),
    "InstanceNorm": LayerType(
        lambda: nn.InstanceNorm1d(2, affine=True), exact.instance_norm, (6, 2, 3), number=Decimal
    ),
    "RNN of ReLUs": LayerType(
        lambda: nn.RNN(2, 2, nonlinearity="relu", batch_first=True), exact.rnn, (8, 3, 2), call=first_output
    ),
    "RNN": LayerType(lambda: nn.RNN(2, 2, batch_first=True), exact.rnn, (6, 3, 2), number=Decimal, call=first_output),
    "LSTM": LayerType(
        lambda: nn.LSTM(2, 2, batch_first=True), exact.lstm, (6, 2, 2), number=Decimal, call=first_output
    ),
    "GRU": LayerType(lambda: nn.GRU(2, 2, batch_first=True), exact.gru, (6, 2, 2), number=Decimal, call=first_output),
    "MultiheadAttention": LayerType(
        lambda: nn.MultiheadAttention(2, 2, batch_first=True),
        exact.attention,
        (6, 2, 2),
        number=Decimal,
        call=to_itself,
    ),
    "TransformerEncoderLayer": LayerType(
        lambda: nn.TransformerEncoderLayer(3, 1, dim_feedforward=2, dropout=0.0, batch_first=True),
        exact.encoder_layer,
        (5, 2, 3),
        number=Decimal,
    ),
}


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A network, its inputs, and its exact outputs and Jacobian."""

    module: Headed
    inputs: Tensor
    outputs: np.ndarray
    jacobian: np.ndarray
    columns: dict[str, list[int]]
    number: type

    def rank(self, matrix: np.ndarray) -> int:
        """The exact rank of (some columns of) the Jacobian."""
        if self.number is int:
            return exact_rank(matrix)
        if self.number is Fraction:
            return rank_of_fractions(matrix + Fraction(0))
        with localcontext() as context:
            context.prec = DIGITS
            return rank_of_decimals(matrix)


def evaluated(module: Headed, inputs: Tensor, number: type) -> Evaluated:
    """A network over exact numbers."""
    module.eval()
    with localcontext() as context:
        context.prec = DIGITS
        network = ExactNetwork(module, number=number)
        outputs = module.exact(network, inputs)
    gradients = outputs.gradient.reshape(-1, network.num_parameters)
    return Evaluated(module, inputs, outputs.value, gradients, network.columns, number)


def built(name: str, seed: int) -> tuple[Headed, Tensor]:
    kind = TYPES[name]
    inputs = kind.inputs(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Headed(kind.build(), kind.rule, kind.call, inputs), inputs


@torch.no_grad()
def integer_network(name: str, seed: int) -> tuple[Headed, Tensor]:
    """With random integers in place of all weights and statistics, such that roots are rational where they can be."""
    module, inputs = built(name, seed)
    generator = torch.Generator().manual_seed(seed)
    # Quarters, where an exponential of whole numbers would saturate.
    divisor = 4 if TYPES[name].number is Decimal else 1
    for parameter in module.parameters():
        parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator) / divisor)
    for buffer_name, buffer in module.named_buffers():
        if buffer_name.endswith("running_var"):  # With eps = 1, squares of 1, 2 and 3.
            buffer.copy_(torch.randint(1, 4, buffer.shape, generator=generator).square() - 1)
        elif buffer.is_floating_point():
            buffer.copy_(torch.randint(1, 4, buffer.shape, generator=generator))
    if name == "weight_norm":  # Rows whose lengths are whole numbers.
        module.part.parametrizations.weight.original1.copy_(torch.tensor([[3.0, 4.0], [-4.0, 3.0], [5.0, 12.0]]))
    return module.eval(), inputs


def trained_network(name: str, seed: int) -> tuple[Headed, Tensor]:
    """Some steps of Adam in float32 towards random targets."""
    module, inputs = built(name, seed)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(len(inputs), 2, generator=generator)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        (module(inputs) - targets).square().mean().backward()
        optimizer.step()
    return module.eval(), inputs


@cache
def integer_case(name: str, seed: int) -> Evaluated:
    """A network with integer weights over exact numbers, computed once."""
    return evaluated(*integer_network(name, seed), TYPES[name].number)


@cache
def trained_case(name: str, seed: int) -> Evaluated:
    """A trained network over decimals, computed once."""
    return evaluated(*trained_network(name, seed), Decimal)
