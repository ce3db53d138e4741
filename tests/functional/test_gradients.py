import numpy as np
import pytest
import torch

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import Block, StackedGradients, add_columns, gram_of
from tests.networks import drawn

# A weight of 3 x 2, stored by rows or by columns, then its bias of 3; each element holds its own column.
WEIGHT_AND_BIAS = np.array([[0, 1, 6], [2, 3, 7], [4, 5, 8]])
COLUMNS = {
    "by rows": ((Block((3, 2), (2, 1), 0), Block((3,), (1,), 6)), WEIGHT_AND_BIAS),
    "by columns": ((Block((3, 2), (1, 3), 0), Block((3,), (1,), 6)), np.array([[0, 3, 6], [1, 4, 7], [2, 5, 8]])),
    "without bias": ((Block((3, 2), (2, 1), 1),), WEIGHT_AND_BIAS[:, :2] + 1),
    "three axes": ((Block((3, 1, 2), (2, 2, 1), 0),), WEIGHT_AND_BIAS[:, :2]),
    "a tensor": (torch.from_numpy(WEIGHT_AND_BIAS.ravel()), WEIGHT_AND_BIAS),
}


@pytest.mark.parametrize("shape", [(), (4,)], ids=["vector", "matrix"])
@pytest.mark.parametrize("name", COLUMNS)
def test_columns_are_added_at_their_places(name, shape):
    columns, places = COLUMNS[name]
    values = np.random.default_rng(0).integers(-9, 10, (*shape, places.size))
    expected = np.ones((*shape, 10))
    expected[..., places.ravel()] += values
    found = torch.ones(*shape, 10, dtype=torch.float64)
    add_columns(found, columns, torch.from_numpy(values.astype(np.float64)))
    assert np.array_equal(found.numpy(), expected)


def test_parts_stand_side_by_side():
    factors, dense = KhatriRaoGradients(drawn(4, 1, 2), drawn(4, 1, 1, 3, seed=1)), DenseGradients(drawn(4, 3, seed=2))
    gradients = StackedGradients(
        (factors, dense),
        ((Block((3, 2), (1, 3), 3),), (Block((3,), (1,), 0),)),
        num_rows=4,
        num_columns=10,
        device=torch.device("cpu"),
    )
    rows = gradients.rows()
    assert torch.equal(rows[:, :3], dense.matrix)
    assert torch.equal(rows[:, 3:9], factors.rows().view(4, 3, 2).mT.reshape(4, 6))
    assert not rows[:, 9].any()
    weights = drawn(4, seed=3)
    torch.testing.assert_close(gradients.combination(weights), weights @ rows)
    torch.testing.assert_close(gram_of(gradients).whole(), rows @ rows.mT)
