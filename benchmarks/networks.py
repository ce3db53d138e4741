"""The networks on which everything is measured, each with a fixed probe and reproducible weights."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

@dataclass(frozen=True)
class Workload:
    """A network, and the inputs on which it is measured.

    Attributes:
        name: As in ``--networks``.
        title: For people.
        build: Returns the network; call it after seeding.
        draw: Returns so many inputs.
        num_inputs: Of the probe, k.
        num_outputs: Per input, c.
        family: ``"mlp"``, ``"cnn"`` or ``"other"``: decides which goals apply.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], Tensor]
    num_inputs: int
    num_outputs: int
    family: str

    @property
    def num_rows(self) -> int:
        """Outputs on the probe, m."""
        return self.num_inputs * self.num_outputs

    @property
    def num_parameters(self) -> int:
        """Trainable, N."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())

    def module(self, dtype: torch.dtype) -> nn.Module:
        """The network in evaluation mode; the same numbers in every type that holds them."""
        torch.manual_seed(0)
        return self.build().to(dtype).eval()

    def probe(self, dtype: torch.dtype, *, is_repeated: bool = False) -> Tensor:
        """The inputs; with ``is_repeated`` the last eighth of them repeats the first, which lowers ranks."""
        torch.manual_seed(1)
        inputs = self.draw(self.num_inputs)
        if is_repeated:
            count = self.num_inputs // 8
            inputs[-count:] = inputs[:count]
        return inputs.to(dtype) if inputs.is_floating_point() else inputs

    def targets(self, dtype: torch.dtype) -> Tensor:
        """For a mean squared error."""
        torch.manual_seed(2)
        return torch.randn(self.num_inputs, self.num_outputs).to(dtype)


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(first: int = 16, second: int = 32, hidden: int = 128) -> nn.Sequential:
    """Two convolutions and two linear layers for one channel of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 16, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


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
    """Attention and a hidden layer, each behind a normalisation and beside a skip connection."""

    def __init__(self, width: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mixed = nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
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
    """Two normalised convolutions beside a skip connection."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.skip = (
            nn.Identity()
            if stride == 1 and before == after
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(hidden)) + self.skip(x))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="seed",
            title="MLP 2-10-1, tanh",
            build=lambda: mlp(2, 10, 1, activation=nn.Tanh),
            draw=lambda count: torch.randn(count, 2),
            num_inputs=20,
            num_outputs=1,
            family="seed",
        ),
        Workload(
            name="mlp",
            title="MLP 64-128-128-10",
            build=lambda: mlp(64, 128, 128, 10),
            draw=lambda count: torch.randn(count, 64),
            num_inputs=256,
            num_outputs=10,
            family="mlp",
        ),
        Workload(
            name="mlp-large",
            title="MLP 784-512-512-10",
            build=lambda: mlp(784, 512, 512, 10),
            draw=lambda count: torch.randn(count, 784),
            num_inputs=256,
            num_outputs=10,
            family="mlp",
        ),
        Workload(
            name="cnn",
            title="CNN 1-16-32-fc128-10 on 8 x 8",
            build=cnn,
            draw=lambda count: torch.randn(count, 1, 8, 8),
            num_inputs=128,
            num_outputs=10,
            family="cnn",
        ),
        Workload(
            name="transformer",
            title="Transformer, 2 blocks of width 64, 16 tokens",
            build=Transformer,
            draw=lambda count: torch.randint(0, 32, (count, 16)),
            num_inputs=64,
            num_outputs=8,
            family="other",
        ),
        Workload(
            name="resnet",
            title="ResNet-18-shaped CNN on 32 x 32",
            build=ResNet,
            draw=lambda count: torch.randn(count, 3, 32, 32),
            num_inputs=32,
            num_outputs=10,
            family="other",
        ),
    )
}
