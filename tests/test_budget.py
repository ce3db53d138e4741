import pytest

from lightning_basin.budget import ChunkedRun


@pytest.mark.parametrize(
    ("rest", "reserved", "chunk_size"),
    [
        pytest.param(1000, 0, 4, id="all: half of the memory is enough for their graph"),
        pytest.param(700, 0, 2, id="a third of 650 for the graph"),
        pytest.param(200, 0, 1, id="no third, and 150 are enough for one"),
        pytest.param(200, 60, 0, id="90 are not"),
    ],
)
def test_chunks_leave_two_thirds_for_gradients_where_these_are_not_needed_for_a_single_input(
    rest, reserved, chunk_size
):
    run = ChunkedRun(num_inputs=4, graph=100, activations=50, rest=rest, copies=1, reserved=reserved)
    assert run.chunk_size == chunk_size
