"""The networks on which everything is measured, each with fixed inputs and reproducible weights."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Workload:
    """A network and its inputs.

    Attributes:
        name: The name for ``--networks``.
        title: The name in a heading.
        build: Returns the network; call it after seeding.
        draw: Returns as many inputs as it is told to; call it after seeding.
        num_inputs: The number of inputs, k.
        num_outputs: The number of outputs per input, c.
        is_repeated: Whether the last eighth of the inputs repeats the first one, which lowers ranks.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], Tensor]
    num_inputs: int
    num_outputs: int
    is_repeated: bool = False

    @property
    def heading(self) -> str:
        """The title with the sizes."""
        sizes = f"N = {self.num_parameters:,}, k = {self.num_inputs:,}, m = {self.num_rows:,}"
        return f"{self.title} (`{self.name}`): {sizes}" if self.num_parameters else self.title

    @property
    def num_rows(self) -> int:
        """The number of outputs on all inputs, m."""
        return self.num_inputs * self.num_outputs

    @property
    def num_parameters(self) -> int:
        """The number of trainable parameters, N."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())

    def module(self, dtype: torch.dtype) -> nn.Module:
        """The network in evaluation mode; its weights are the same in every type that holds them."""
        torch.manual_seed(0)
        return self.build().to(dtype).eval()

    def probe(self, dtype: torch.dtype) -> Tensor:
        """The inputs; they are the same in every type that holds them."""
        torch.manual_seed(1)
        inputs = self.draw(self.num_inputs)
        if self.is_repeated:
            count = self.num_inputs // 8
            inputs[-count:] = inputs[:count]
        return inputs.to(dtype) if inputs.is_floating_point() else inputs


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(first: int = 16, second: int = 32, hidden: int = 128) -> nn.Sequential:
    """Two convolutions and two linear layers for one channel of 8 x 8."""
    convolutions = [nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.Conv2d(first, second, 3, padding=1), nn.ReLU()]
    linear = [nn.Linear(second * 16, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *linear)


class Transformer(nn.Module):
    """An encoder of two blocks with learned positions, whose outputs are those of the mean token."""

    def __init__(self, *, vocabulary: int = 32, length: int = 16, width: int = 64, num_outputs: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(TransformerBlock(width), TransformerBlock(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))).mean(1))


class TransformerBlock(nn.Module):
    """Attention and a hidden layer, each behind a normalization and beside a skip connection."""

    def __init__(self, width: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mixed = nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        projected = (layer(normed) for layer in (self.query, self.key, self.value))
        query, key, value = (heads.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for heads in projected)
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        x = x + self.mixed((weights @ value).transpose(1, 2).flatten(2))
        return x + self.hidden(self.hidden_norm(x))


class ResNet(nn.Module):
    """Eight basic blocks in four stages, as in ResNet-18, for images of 32 x 32."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            *(
                nn.Sequential(ResidualBlock(before, after, stride), ResidualBlock(after, after, 1))
                for before, after, stride in zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
            )
        )
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two normalized convolutions beside a skip connection."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(hidden)) + self.skip(x))


def _by_name(*workloads: Workload) -> dict[str, Workload]:
    return {workload.name: workload for workload in workloads}


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *shape)


def _tokens(count: int) -> Tensor:
    return torch.randint(0, 32, (count, 16))


def _close_pairs(count: int) -> Tensor:
    activations = torch.randn(count // 2, 256, dtype=torch.float64)
    return torch.cat([activations, activations + 1e-9 * torch.randn_like(activations)])


def _repeated(workload: Workload) -> Workload:
    title = f"{workload.title}, the last eighth of the inputs repeated"
    return replace(workload, name=f"{workload.name}-repeated", title=title, is_repeated=True)


_tanh_mlp = partial(mlp, activation=nn.Tanh)

RANKED = _by_name(
    Workload("seed", "MLP 2-10-1, tanh", partial(_tanh_mlp, 2, 10, 1), _normal(2), 20, 1),
    Workload("mlp", "MLP 64-128-128-10", partial(mlp, 64, 128, 128, 10), _normal(64), 256, 10),
    Workload("mlp-large", "MLP 784-512-512-10", partial(mlp, 784, 512, 512, 10), _normal(784), 256, 10),
    Workload("cnn", "CNN 1-16-32-fc128-10 on 8 x 8", cnn, _normal(1, 8, 8), 128, 10),
    Workload("transformer", "Transformer, 2 blocks of width 64, 16 tokens", Transformer, _tokens, 64, 8),
    Workload("resnet", "ResNet-18-shaped CNN on 32 x 32", ResNet, _normal(3, 32, 32), 32, 10),
)
"""On which ranks and products with the Hessian are compared."""

REPEATED = _by_name(*(_repeated(RANKED[name]) for name in ("seed", "cnn")))
"""Two of them with ranks below the number of rows, where only what does not square sees the right integer."""

SCALED = _by_name(
    *(
        Workload(f"width-{width}", f"MLP 64-{width}-{width}-1", partial(mlp, 64, width, width, 1), _normal(64), 64, 1)
        for width in (270, 945, 3100)
    )
)
"""The same number of rows over more and more parameters: 1e5, 1e6 and 1e7."""

FITTED = _by_name(
    Workload("mlp-3e3", "MLP 40-40-28-10", partial(_tanh_mlp, 40, 40, 28, 10), _normal(40), 64, 10),
    Workload("mlp-1e6", "MLP 500-800-740-10", partial(_tanh_mlp, 500, 800, 740, 10), _normal(500), 32, 10),
)
"""On which null spaces of Hessians are counted, close to a perfect fit."""

PAIRS = _by_name(
    Workload(
        "pairs", "2,048 activations of width 256 in pairs that differ by 1e-9", nn.Identity, _close_pairs, 2048, 256
    )
)
"""Activations in which duplicates are counted."""

WORKLOADS = RANKED | REPEATED | SCALED | FITTED | PAIRS
