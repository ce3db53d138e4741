from dataclasses import dataclass

import pytest
import torch

from lightning_basin import Probe
from lightning_basin.callback.state import fingerprint, probe_state


@dataclass
class Graph:
    nodes: torch.Tensor


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "other",
    [
        Probe(zeros(2, 3), zeros(2)),
        Probe(zeros(3, 2)),
        Probe(zeros(2, 3).double()),
        Probe(torch.eye(3)[:2]),
        Probe((zeros(2, 3), zeros(2, 3))),
    ],
    ids=["targets", "shape", "dtype", "values", "structure"],
)
def test_fingerprint_differs_where_the_tensors_do(other):
    assert fingerprint(other) != fingerprint(Probe(zeros(2, 3)))


def test_fingerprint_does_not_depend_on_strides_or_views():
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    turned = Probe(inputs.T.contiguous().T)
    turned.inputs.requires_grad_(requires_grad=True)
    assert fingerprint(turned) == fingerprint(Probe(inputs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64, torch.complex64])
def test_fingerprint_of_any_dtype(dtype):
    ones, zero = torch.ones(2, 1, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
    assert fingerprint(Probe(ones)) != fingerprint(Probe(zero))


def test_fingerprint_of_a_conjugate_view_is_that_of_its_numbers():
    numbers = torch.tensor([1 + 2j, 3 - 1j])
    assert fingerprint(Probe(numbers.conj())) == fingerprint(Probe(torch.tensor([1 - 2j, 3 + 1j])))


@pytest.mark.parametrize(
    ("inputs", "is_plain"),
    [({"x": zeros(2, 1), "name": ["a", None, 1.5]}, True), (Graph(zeros(2, 1)), False), ((zeros(2), {1j: 0}), False)],
    ids=["builtins", "object", "key"],
)
def test_state_holds_what_weights_only_reads(tmp_path, inputs, is_plain):
    state = probe_state(Probe(inputs))
    assert (state is not None) == is_plain
    torch.save(state, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)
