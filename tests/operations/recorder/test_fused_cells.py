"""Recurrent cells as accelerators run them: one operation that adds the biases itself, given to the CPU here."""

import pytest
import torch
from torch import library, nn

from lightning_basin import measure_basin, neural_tangent_kernel


def lstm(input_gates, hidden_gates, state, input_bias, hidden_bias):
    """Hochreiter and Schmidhuber (1997); all gates are kept for the backward pass."""
    gates = (input_gates + input_bias + hidden_gates + hidden_bias).chunk(4, 1)
    entry, forget, candidate, exit_ = gates[0].sigmoid(), gates[1].sigmoid(), gates[2].tanh(), gates[3].sigmoid()
    cell = forget * state + entry * candidate
    return exit_ * cell.tanh(), cell, torch.cat([entry, forget, candidate, exit_], 1)


def lstm_backward(hidden_gradient, cell_gradient, state, cell, gates, has_bias):
    entry, forget, candidate, exit_ = gates.chunk(4, 1)
    of_hidden = torch.zeros_like(cell) if hidden_gradient is None else hidden_gradient
    through = of_hidden * exit_ * (1 - cell.tanh() ** 2)
    of_cell = through if cell_gradient is None else through + cell_gradient
    of_gates = torch.cat(
        [
            of_cell * candidate * entry * (1 - entry),
            of_cell * state * forget * (1 - forget),
            of_cell * entry * (1 - candidate**2),
            of_hidden * cell.tanh() * exit_ * (1 - exit_),
        ],
        1,
    )
    return of_gates, of_cell * forget, of_gates.sum(0)


def gru(input_gates, hidden_gates, state, input_bias, hidden_bias):
    """Cho et al. (2014), with the reset gate behind the product, as in torch."""
    inputs, hidden = (input_gates + input_bias).chunk(3, 1), (hidden_gates + hidden_bias).chunk(3, 1)
    reset, update = (inputs[0] + hidden[0]).sigmoid(), (inputs[1] + hidden[1]).sigmoid()
    candidate = (inputs[2] + reset * hidden[2]).tanh()
    return (1 - update) * candidate + update * state, torch.cat([reset, update, candidate, state, hidden[2]], 1)


def gru_backward(gradient, kept, has_bias):
    reset, update, candidate, state, hidden = kept.chunk(5, 1)
    of_candidate = gradient * (1 - update) * (1 - candidate**2)
    of_update = gradient * (state - candidate) * update * (1 - update)
    of_reset = of_candidate * hidden * reset * (1 - reset)
    of_inputs = torch.cat([of_reset, of_update, of_candidate], 1)
    of_hidden = torch.cat([of_reset, of_update, of_candidate * reset], 1)
    return of_inputs, of_hidden, gradient * update, of_inputs.sum(0), of_hidden.sum(0)


@pytest.fixture
def _fused_kernels():
    with library._scoped_library("aten", "IMPL") as kernels:
        kernels.impl("_thnn_fused_lstm_cell", lstm, "CPU")
        kernels.impl("_thnn_fused_lstm_cell_backward_impl", lstm_backward, "CPU")
        kernels.impl("_thnn_fused_gru_cell", gru, "CPU")
        kernels.impl("_thnn_fused_gru_cell_backward", gru_backward, "CPU")
        yield


class Recurrent(nn.Module):
    """Some steps of a cell, and a linear layer."""

    def __init__(self, kind, step):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = kind(3, 4), nn.Linear(4, 2)
        self.step = step

    def forward(self, x):
        hidden = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4)
        for position in range(x.shape[1]):
            hidden = self.step(self.cell, x[:, position], hidden)
        return self.head(hidden[0])


def gates_of(cell, x, hidden):
    return x @ cell.weight_ih.T, hidden[0] @ cell.weight_hh.T


def fused_lstm(cell, x, hidden):
    gates = gates_of(cell, x, hidden)
    return torch.ops.aten._thnn_fused_lstm_cell(*gates, hidden[1], cell.bias_ih, cell.bias_hh)[:2]


def fused_gru(cell, x, hidden):
    gates = gates_of(cell, x, hidden)
    return torch.ops.aten._thnn_fused_gru_cell(*gates, hidden[0], cell.bias_ih, cell.bias_hh)


@pytest.mark.usefixtures("_fused_kernels")
@pytest.mark.parametrize(
    ("kind", "fused", "step"),
    [
        (nn.LSTMCell, fused_lstm, lambda cell, x, hidden: cell(x, hidden)),
        (nn.GRUCell, fused_gru, lambda cell, x, hidden: (cell(x, hidden[0]),)),
    ],
)
def test_fused_cells_are_measured_as_those_whose_operations_are_seen(kind, fused, step):
    inputs = torch.randn(30, 3, 3, generator=torch.Generator().manual_seed(1))
    expected, found = (measure_basin(Recurrent(kind, way), inputs) for way in (step, fused))
    assert found.notes == ()  # The layer is not measured row by row.
    assert found.gradient_rank == expected.gradient_rank
    assert found.layers["cell"].gradient_rank == expected.layers["cell"].gradient_rank
    kernels = [neural_tangent_kernel(Recurrent(kind, way), inputs) for way in (step, fused)]
    torch.testing.assert_close(kernels[1], kernels[0], rtol=1e-12, atol=1e-12)
