import pytest
import torch

from examples.claims.learning_coefficient import check, describe, draw, paper_points, run


@pytest.mark.slow
def test_estimates_of_another_package_are_between_their_bounds():
    pytest.importorskip("devinterp")
    result = run(num_steps=4000, num_networks=1)
    check(result)
    # Algebra: 15 independent gradients of 66 parameters.
    assert (result.points[-1].rank, result.points[-1].num_parameters) == (15, 66)
    assert "touch" in describe(result)
    assert draw(result).axes


def test_weights_of_rank_one_have_a_product_of_rank_one():
    _, outputs, weights, coefficient = paper_points()[-1]
    # Aoyagi and Watanabe (2005), M = 4, H = 2, N = 3, r = 1: (-(H + r)^2 - M^2 - N^2 + 2 (H + r)(M + N) + 2 M N) / 8.
    assert coefficient == (-9 - 16 - 9 + 2 * 3 * 7 + 2 * 12) / 8
    product = outputs(torch.tensor([weights], dtype=torch.float64)).reshape(3, 4)
    assert torch.equal(product, torch.outer(torch.eye(3)[0], torch.eye(4)[0]).double())
