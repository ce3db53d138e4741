import pytest

from examples.claims.plasticity import check, describe, draw, run


@pytest.mark.slow
def test_rank_is_necessary_for_plasticity_and_not_sufficient():
    result = run(seeds=range(8), num_tasks=20, steps=150)
    check(result)
    # Algebra: 24 outputs have at most 24 independent gradients.
    assert result.streams["ReLU"].ranks[0][0] <= 24
    assert "Tanh, last quarter" in describe(result)
    assert draw(result).axes
