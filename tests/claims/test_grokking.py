import pytest
import torch

from examples.claims.grokking import Sizes, Transformer, check, describe, draw, run


@pytest.mark.slow
def test_the_integer_rank_of_a_transformer_does_not_move():
    result = run(seeds=range(4), sizes=Sizes(prime=11, stream=6, head=3, hidden=8), moments=(0, 300))
    check(result)
    # Algebra: 66 + 12 + 4 * 36 + 56 + 54 + 66 parameters; 4 * 9 + 36 + 6 of their directions change no output.
    assert (result.num_parameters, result.predicted) == (398, 320)
    assert {moment.rank for curves in result.curves.values() for curve in curves for moment in curve} == {320}
    assert "Rank from algebra: 320" in describe(result)
    assert draw(result).axes


def test_a_matrix_on_the_stream_changes_no_output():
    torch.manual_seed(0)
    sizes = Sizes(prime=7, stream=4, head=2, hidden=6)
    network, pairs = Transformer(sizes).double(), torch.cartesian_prod(torch.arange(7), torch.arange(7))
    before, matrix = network(pairs), torch.eye(4, dtype=torch.float64) + 0.3 * torch.rand(4, 4, dtype=torch.float64)
    with torch.no_grad():
        for writes in (network.embedding.weight, network.positions):
            writes.copy_(writes @ matrix)
        for writes in (network.mixing, network.block[2]):
            writes.weight.copy_(matrix.T @ writes.weight)
        network.block[2].bias.copy_(network.block[2].bias @ matrix)
        for reads in (network.queries, network.keys, network.values, network.block[0], network.logits):
            reads.weight.copy_(reads.weight @ matrix.inverse().T)
    torch.testing.assert_close(network(pairs), before, rtol=1e-12, atol=1e-12)


def test_a_vector_that_no_query_sees_can_move_from_positions_to_biases():
    torch.manual_seed(0)
    network, pairs = Transformer(Sizes(prime=7, stream=6, head=2, hidden=5)).double(), torch.tensor([[0, 1], [5, 2]])
    before = network(pairs)
    vector = torch.linalg.svd(network.queries.weight).Vh[-1]
    with torch.no_grad():
        added = vector + network.mixing(network.values(vector))
        network.positions.add_(vector)
        network.block[0].bias.sub_(network.block[0].weight @ added)
        network.block[2].bias.sub_(added)
    torch.testing.assert_close(network(pairs), before, rtol=1e-12, atol=1e-12)
