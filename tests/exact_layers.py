"""Layers over dual numbers by the formulas of their papers: nothing here knows how torch computes them."""

from decimal import Decimal
from fractions import Fraction
from itertools import product
from math import isqrt, prod
from typing import Any

import numpy as np
from torch import nn

from tests.exact import Dual, ExactNetwork


def root(number: Any) -> Any:
    """The square root of a decimal, or of a fraction that is a square."""
    if isinstance(number, Decimal):
        return number.sqrt()
    found = Fraction(isqrt(number.numerator), isqrt(number.denominator))
    assert found * found == number
    return found


def inverse_root(x: Dual) -> Dual:
    return x.through(lambda v: 1 / root(v), lambda v, found: -found / (2 * v))


def reciprocal(x: Dual) -> Dual:
    return x.through(lambda v: 1 / v, lambda v, found: -found * found)


def exponential(x: Dual) -> Dual:
    return x.through(lambda v: v.exp(), lambda v, found: found)


def sigmoid(x: Dual) -> Dual:
    return x.through(lambda v: 1 / (1 + (-v).exp()), lambda v, found: found * (1 - found))


def tanh(x: Dual) -> Dual:
    return x.through(lambda v: 1 - 2 / (1 + (2 * v).exp()), lambda v, found: 1 - found * found)


def softmax(x: Dual) -> Dual:
    """Over the last axis of three."""
    raised = exponential(x)
    return raised * reciprocal(raised.sum(2))[:, :, None]


def relu(x: Dual) -> Dual:
    return x.relu()


def joined(parts: list[Dual], axis: int) -> Dual:
    """Side by side along an axis of the value."""
    return Dual(
        np.concatenate([part.value for part in parts], axis),
        np.concatenate([part.gradient for part in parts], axis),
        None,
    )


# Products.


def bilinear(network: ExactNetwork, name: str, part: nn.Bilinear, x: Dual) -> Dual:
    """x W y + b of the two halves of what enters."""
    left, right = x[:, : part.in1_features], x[:, part.in1_features :]
    weight = network.parameter(f"{name}.weight")
    products = (left[:, None, :, None] * weight).sum(2)
    return (products * right[:, None]).sum(2) + network.parameter(f"{name}.bias")


def convolution(network: ExactNetwork, name: str, part: Any, x: Dual) -> Dual:
    spread = _spread(x, [(padding, padding) for padding in part.padding], (1,) * len(part.padding))
    kernel = network.parameter(f"{name}.weight")
    return _shifted(network, name, _correlated(spread, kernel, part.stride, part.dilation, part.groups))


def transposed_convolution(network: ExactNetwork, name: str, part: Any, x: Dual) -> Dual:
    """The adjoint of a convolution: what enters is spread out by the stride, and met by the kernel turned around."""
    margins = [
        (dilation * (size - 1) - padding, dilation * (size - 1) - padding + added)
        for size, dilation, padding, added in zip(
            part.kernel_size, part.dilation, part.padding, part.output_padding, strict=True
        )
    ]
    kernel = network.parameter(f"{name}.weight")
    channels, per_group, *window = kernel.value.shape
    kernel = kernel.reshape(part.groups, channels // part.groups, per_group, *window).moveaxis(2, 1)
    kernel = kernel.reshape(part.groups * per_group, channels // part.groups, *window)
    turned = kernel[(slice(None), slice(None), *(slice(None, None, -1) for _ in window))]
    ones = (1,) * len(window)
    return _shifted(
        network, name, _correlated(_spread(x, margins, part.stride), turned, ones, part.dilation, part.groups)
    )


def _shifted(network: ExactNetwork, name: str, x: Dual) -> Dual:
    if not network.has(f"{name}.bias"):
        return x
    return x + network.parameter(f"{name}.bias").reshape(-1, *(1,) * (x.value.ndim - 2))


def _spread(x: Dual, margins: list[tuple[int, int]], stride: tuple[int, ...]) -> Dual:
    """Zeros between and around the places."""
    spatial = x.value.shape[2:]
    lengths = [(size - 1) * s + 1 + a + b for size, s, (a, b) in zip(spatial, stride, margins, strict=True)]
    places = [slice(a, a + (size - 1) * s + 1, s) for size, s, (a, _) in zip(spatial, stride, margins, strict=True)]

    def wide(array: np.ndarray) -> np.ndarray:
        found = np.zeros((*array.shape[:2], *lengths, *array.shape[2 + len(lengths) :]), dtype=array.dtype)
        found[(slice(None), slice(None), *places)] = array
        return found

    return Dual(wide(x.value), wide(x.gradient), None)


def _correlated(x: Dual, kernel: Dual, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Dual:
    k, _, *sizes = x.value.shape
    num_out, per_group, *window = kernel.value.shape
    counts = [
        (size - d * (length - 1) - 1) // s + 1
        for size, length, s, d in zip(sizes, window, stride, dilation, strict=True)
    ]
    seen = np.array(
        [
            [
                np.ravel_multi_index(
                    [s * p + d * q for s, p, d, q in zip(stride, at, dilation, offset, strict=True)], sizes
                )
                for offset in product(*map(range, window))
            ]
            for at in product(*map(range, counts))
        ]
    )
    patches = x.reshape(k, groups, 1, per_group, prod(sizes))[:, :, :, :, seen]
    weights = kernel.reshape(groups, num_out // groups, per_group, 1, prod(window))
    return (patches * weights).sum(5).sum(3).reshape(k, num_out, *counts)


# Look-ups.


def embedding(network: ExactNetwork, name: str, part: nn.Embedding, tokens: np.ndarray) -> Dual:
    """Rows of the table; that of the padding is a constant."""
    found = network.parameter(f"{name}.weight")[tokens]
    if part.padding_idx is None:
        return found
    return Dual(found.value, found.gradient * (tokens != part.padding_idx)[..., None, None].astype(np.int64), None)


def bag(network: ExactNetwork, name: str, part: nn.EmbeddingBag, tokens: np.ndarray) -> Dual:
    found = network.parameter(f"{name}.weight")[tokens].sum(1)
    one = type(found.value.flat[0])(1)
    return found.scaled(one / tokens.shape[1]) if part.mode == "mean" else found


# Scaling and shifting.


def prelu(network: ExactNetwork, name: str, part: nn.PReLU, x: Dual) -> Dual:
    slope = network.parameter(f"{name}.weight").reshape(-1, *(1,) * (x.value.ndim - 2))
    return x.relu() + x.scaled(-1).relu().scaled(-1) * slope


def negated_prelu(network: ExactNetwork, name: str, part: nn.PReLU, x: Dual) -> Dual:
    return prelu(network, name, part, x).scaled(-1)


def batch_norm(network: ExactNetwork, name: str, part: Any, x: Dual) -> Dual:
    """By the statistics that training left."""
    channels = (-1, *(1,) * (x.value.ndim - 2))
    mean, variance = (network.numbers(statistic) for statistic in (part.running_mean, part.running_var))
    eps = type(variance[0])(part.eps)
    scale = np.array([1 / root(value + eps) for value in variance], dtype=object)
    centred = x + network.constant(-mean.reshape(channels))
    return _affine(network, name, centred.scaled(scale.reshape(channels)), channels)


def layer_norm(network: ExactNetwork, name: str, part: nn.LayerNorm, x: Dual) -> Dual:
    return _affine(network, name, _normalised(x, part.eps, part.normalized_shape[0], centred=True), (-1,))


def rms_norm(network: ExactNetwork, name: str, part: nn.RMSNorm, x: Dual) -> Dual:
    return _affine(network, name, _normalised(x, part.eps, part.normalized_shape[0], centred=False), (-1,))


def group_norm(network: ExactNetwork, name: str, part: nn.GroupNorm, x: Dual) -> Dual:
    size = prod(x.value.shape[1:]) // part.num_groups
    return _affine(network, name, _normalised(x, part.eps, size, centred=True), (-1, *(1,) * (x.value.ndim - 2)))


def instance_norm(network: ExactNetwork, name: str, part: Any, x: Dual) -> Dual:
    size = prod(x.value.shape[2:])
    return _affine(network, name, _normalised(x, part.eps, size, centred=True), (-1, *(1,) * (x.value.ndim - 2)))


def _normalised(x: Dual, eps: float, size: int, *, centred: bool) -> Dual:
    """Neighbours, so many at a time, divided by their standard deviation or root mean square."""
    rows = x.reshape(-1, size)
    if centred:
        rows = rows + rows.sum(1)[:, None].scaled(Decimal(-1) / size)
    squares = rows.square().sum(1)[:, None].scaled(Decimal(1) / size)
    scale = inverse_root(Dual(squares.value + Decimal(eps), squares.gradient, None))
    return (rows * scale).reshape(*x.value.shape)


def _affine(network: ExactNetwork, name: str, x: Dual, shape: tuple[int, ...]) -> Dual:
    x = x * network.parameter(f"{name}.weight").reshape(*shape)
    return x + network.parameter(f"{name}.bias").reshape(*shape) if network.has(f"{name}.bias") else x


# Parametrizations of a linear layer.


def weight_normalised(network: ExactNetwork, name: str, part: nn.Linear, x: Dual) -> Dual:
    """Each row g v / |v| (Salimans and Kingma, 2016)."""
    length, direction = (network.parameter(f"{name}.parametrizations.weight.original{index}") for index in (0, 1))
    unit = direction * inverse_root(direction.square().sum(1))[:, None]
    return network.linear(name, x, weight=length * unit)


def spectrally_normalised(network: ExactNetwork, name: str, part: Any, x: Dual) -> Dual:
    """W / (u W v), with the vectors u and v that training left (Miyato et al., 2018)."""
    original = network.parameter(f"{name}.parametrizations.weight.original")
    vectors = part.parametrizations.weight[0]
    u, v = network.numbers(vectors._u), network.numbers(vectors._v)
    norm = original.scaled(u[:, None] * v).reshape(1, -1).sum(1)
    return network.linear(name, x, weight=original * reciprocal(norm))


def symmetric(network: ExactNetwork, name: str, part: nn.Linear, x: Dual) -> Dual:
    original = network.parameter(f"{name}.parametrizations.weight.original")
    return network.linear(name, x, weight=original + original.moveaxis(0, 1))


# Sequences, shape (k, t, d).


def attention(network: ExactNetwork, name: str, part: nn.MultiheadAttention, x: Dual) -> Dual:
    """Vaswani et al. (2017), equation 1, for heads of equal size; queries, keys and values packed into one matrix."""
    d = x.value.shape[2]
    size = d // part.num_heads
    packed = network.linear(name, x, weight=f"{name}.in_proj_weight") + network.parameter(f"{name}.in_proj_bias")
    heads = []
    for head in range(part.num_heads):
        query, key, value = (packed[:, :, i * d + head * size : i * d + (head + 1) * size] for i in range(3))
        scores = (query[:, :, None] * key[:, None]).sum(3).scaled(1 / root(Decimal(size)))
        weights = softmax(scores)
        heads.append((weights[:, :, :, None] * value[:, None]).sum(2))
    return network.linear(f"{name}.out_proj", joined(heads, 2))


def encoder_layer(network: ExactNetwork, name: str, part: nn.TransformerEncoderLayer, x: Dual) -> Dual:
    """Attention and a network of two layers, each beside a skip connection and normalised afterwards."""
    x = layer_norm(network, f"{name}.norm1", part.norm1, x + attention(network, f"{name}.self_attn", part.self_attn, x))
    inner = network.linear(f"{name}.linear1", x).relu()
    return layer_norm(network, f"{name}.norm2", part.norm2, x + network.linear(f"{name}.linear2", inner))


def _gates(network: ExactNetwork, name: str, source: str, x: Dual, size: int) -> list[Dual]:
    """What the gates of a recurrent cell get from what enters (ih) or from its state (hh)."""
    weight, bias = (network.parameter(f"{name}.{kind}_{source}_l0") for kind in ("weight", "bias"))
    rows = (x[:, None] * weight).sum(2) + bias
    return [rows[:, start : start + size] for start in range(0, rows.value.shape[1], size)]


def rnn(network: ExactNetwork, name: str, part: nn.RNN, x: Dual) -> Dual:
    size = part.hidden_size
    state = _zeros(network, x, size)
    states = []
    for step in range(x.value.shape[1]):
        (entered,), (kept,) = _gates(network, name, "ih", x[:, step], size), _gates(network, name, "hh", state, size)
        state = (relu if part.nonlinearity == "relu" else tanh)(entered + kept)
        states.append(state[:, None])
    return joined(states, 1)


def lstm(network: ExactNetwork, name: str, part: nn.LSTM, x: Dual) -> Dual:
    """Hochreiter and Schmidhuber (1997), with the forget gate of Gers et al. (2000)."""
    size = part.hidden_size
    state = cell = _zeros(network, x, size)
    states = []
    for step in range(x.value.shape[1]):
        pairs = zip(
            _gates(network, name, "ih", x[:, step], size), _gates(network, name, "hh", state, size), strict=True
        )
        put, forget, new, out = (entered + kept for entered, kept in pairs)
        cell = sigmoid(forget) * cell + sigmoid(put) * tanh(new)
        state = sigmoid(out) * tanh(cell)
        states.append(state[:, None])
    return joined(states, 1)


def gru(network: ExactNetwork, name: str, part: nn.GRU, x: Dual) -> Dual:
    """Cho et al. (2014), as cuDNN has it: the reset gate acts after the product with the state."""
    size = part.hidden_size
    state = _zeros(network, x, size)
    states = []
    for step in range(x.value.shape[1]):
        entered, kept = _gates(network, name, "ih", x[:, step], size), _gates(network, name, "hh", state, size)
        reset, update = (sigmoid(entered[i] + kept[i]) for i in (0, 1))
        new = tanh(entered[2] + reset * kept[2])
        state = new + update * (state + new.scaled(-1))
        states.append(state[:, None])
    return joined(states, 1)


def _zeros(network: ExactNetwork, x: Dual, size: int) -> Dual:
    return network.constant(np.full((len(x.value), size), 0 * x.value.ravel()[0], dtype=x.value.dtype))


# Parameters without a layer of torch's around them.


def positions_and_token(network: ExactNetwork, name: str, part: nn.Module, x: Dual) -> Dual:
    """A class token before the sequence, then a positional embedding and a scale of each feature."""
    token = network.parameter(f"{name}.token") + network.constant(np.zeros_like(x.value[:, :1]))
    shifted = joined([token, x], 1) + network.parameter(f"{name}.positions")
    return shifted * network.parameter(f"{name}.scale")


def tied_head(network: ExactNetwork, name: str, part: nn.Module, tokens: np.ndarray) -> Dual:
    table = f"{name}.table.weight"
    inner = network.parameter(table)[tokens].sum(1).relu()
    return network.linear(f"{name}.head", inner, weight=table)


def repeated(network: ExactNetwork, name: str, part: nn.Module, x: Dual) -> Dual:
    """One linear layer, three times in a row."""
    for _ in range(3):
        x = network.linear(f"{name}.inner", x).relu()
    return x


def linear(network: ExactNetwork, name: str, part: nn.Linear, x: Dual) -> Dual:
    return network.linear(name, x)
