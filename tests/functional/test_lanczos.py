import math

import numpy as np
import pytest
import torch

from lightning_basin.functional.lanczos import NormIteration, next_bounds


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def norm_bounds(product, num_rows, **settings):
    iteration = NormIteration(num_rows, **settings)
    while not iteration.is_finished:
        yield from next_bounds([iteration], [product(iteration.vector)])


def bounds_of(diagonal, max_products=100, seed=0, **settings):
    """Bounds for a matrix with these eigenvalues and eigenvectors that are no unit vectors."""
    diagonal = torch.as_tensor(diagonal, dtype=torch.float64)
    size = len(diagonal)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator(9), dtype=torch.float64)).Q
    matrix = (basis * diagonal) @ basis.mT
    settings = {"generator": generator(seed), "max_products": max_products} | settings
    return list(norm_bounds(lambda v: matrix @ v, size, **settings))


@pytest.mark.parametrize(
    "eigenvalues",
    [
        [5.0],
        [-5.0],
        [1.0, -3.0],
        [4.0, 4.0, 1.0],
        [-7.0, -7.0, 2.0, 0.0, 0.0],
        [1e-30, 3e-30],
        [2.0**-i for i in range(20)],
        list(range(-12, 10)),
    ],
    ids=["one", "negative one", "two", "double", "double negative", "tiny", "geometric", "arithmetic"],
)
def test_an_exhausted_krylov_space_gives_the_norm(eigenvalues):
    last = bounds_of(eigenvalues)[-1]
    norm = max(map(abs, eigenvalues))
    assert last.value == pytest.approx(norm, rel=1e-12)
    assert last.upper == pytest.approx(norm, rel=1e-12)
    assert last.num_products <= len(eigenvalues)


@pytest.mark.parametrize(
    "eigenvalues", [[5.0, -3.0, 1.0, 0.5, -0.1, 0.0], [1.0] * 3 + [-1.0] * 3, [2.0**-i for i in range(9)]]
)
def test_the_norm_on_the_krylov_space_is_a_lower_bound(eigenvalues):
    matrix, krylov = np.diag(eigenvalues), []
    iteration = NormIteration(len(eigenvalues), generator=generator(), max_products=4)
    while not iteration.is_finished:
        krylov.append(iteration.vector.numpy())
        (bound,) = next_bounds([iteration], [torch.from_numpy(matrix @ krylov[-1])])
        # All singular values of the matrix on an orthonormal basis of the space, by another library.
        assert bound.lower == pytest.approx(np.linalg.norm(matrix @ np.array(krylov).T, 2), rel=1e-12)
        assert bound.value <= bound.lower * (1 + 1e-12) <= max(map(abs, eigenvalues)) * (1 + 1e-11)


def test_multiple_eigenvalues_need_one_product_each():
    assert bounds_of([3.0] * 5 + [-1.0] * 4)[-1].num_products == 2


@pytest.mark.parametrize("size", [1, 2, 50])
def test_the_zero_operator_is_found_out_by_one_product(size):
    (only,) = norm_bounds(torch.zeros_like, size, generator=generator(), max_products=20)
    assert (only.value, only.residual, only.upper, only.num_products) == (0.0, 0.0, 0.0, 1)


def test_no_more_products_are_taken_than_asked_for():
    assert [bound.num_products for bound in bounds_of(range(1, 41), max_products=7)] == list(range(1, 8))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "eigenvalues",
    [torch.linspace(-1, 1, 300), torch.linspace(0, 1, 300), torch.tensor([-1.0] + [0.9] * 150 + [1e-3] * 149)],
    ids=["symmetric", "one sided", "negative extreme"],
)
def test_the_norm_lies_between_the_bounds_after_every_product(eigenvalues, seed):
    for bound in bounds_of(eigenvalues, max_products=60, seed=seed):
        assert bound.value <= 1 + 1e-12
        assert bound.upper >= 1 - 1e-12


def test_thirty_products_know_a_full_spectrum_to_a_factor_of_two():
    last = bounds_of(torch.linspace(-1, 1, 1000), max_products=30)[-1]
    assert last.upper < 2 * last.value


def test_an_isolated_extreme_is_known_well_once_lanczos_has_converged():
    spectrum = torch.cat([torch.tensor([-1.0]), 0.1 * torch.linspace(-1, 1, 500)])
    last = bounds_of(spectrum, max_products=25)[-1]
    assert last.upper == pytest.approx(1.0, rel=1e-3)
    assert last.residual < 1e-10


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_the_bound_fails_at_most_with_its_probability(probability):
    # After one product of two eigenvalues, the start vector alone decides whether the larger one is seen.
    diagonal = torch.tensor([1.0] + [0.0] * 29, dtype=torch.float64)
    failures = 0
    for seed in range(600):
        first = next(
            norm_bounds(
                lambda v: diagonal * v, 30, generator=generator(seed), max_products=1, failure_probability=probability
            )
        )
        failures += first.upper < 1
    # Three standard deviations of 600 draws above the probability.
    assert failures / 600 <= probability + 3 * math.sqrt(probability / 600)


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_the_bound_from_a_vector_that_is_near_fails_at_most_with_its_probability(probability):
    # The vector that is near has no part along the eigenvector, or takes some of the random one away.
    diagonal, failures = torch.tensor([1.0] + [0.0] * 29, dtype=torch.float64), 0
    for seed in range(600):
        near = torch.zeros(30, dtype=torch.float64)
        near[1], near[0] = 1.0, 0.05 * (seed % 2)
        iteration = NormIteration(
            30, generator=generator(seed), max_products=1, failure_probability=probability, near=near
        )
        (only,) = next_bounds([iteration], [diagonal * iteration.vector])
        failures += only.upper < 1
    assert failures / 600 <= probability + 3 * math.sqrt(probability / 600)


def test_a_vector_that_is_near_brings_the_ritz_value_sooner():
    diagonal = torch.linspace(0, 1, 1000, dtype=torch.float64)
    near = torch.zeros(1000, dtype=torch.float64)
    near[-1] = -7.0

    def last(**settings):
        return list(norm_bounds(lambda v: diagonal * v, 1000, generator=generator(), max_products=5, **settings))[-1]

    assert 1 - last(near=near).value < 0.02 < 1 - last().value
    assert last(near=near).upper >= 1


def test_the_ritz_vector_is_an_eigenvector_once_lanczos_has_converged():
    spectrum = torch.cat([torch.tensor([-1.0]), 0.1 * torch.linspace(-1, 1, 500)]).double()
    iteration = NormIteration(501, generator=generator(), max_products=25)
    while not iteration.is_finished:
        (bound,) = next_bounds([iteration], [spectrum * iteration.vector])
    vector = iteration.ritz_vector()
    assert abs(float(vector[0])) == pytest.approx(1.0, abs=1e-9)
    assert float((spectrum * vector + vector).norm()) == pytest.approx(bound.residual, abs=1e-12)
    assert bound.gap == pytest.approx(0.9, rel=0.02)  # To the end of the others, at -0.1.


def test_a_smaller_failure_probability_gives_a_larger_bound():
    safe, risky = (
        bounds_of(torch.linspace(-1, 1, 200), max_products=10, failure_probability=p)[-1] for p in (1e-12, 1e-2)
    )
    assert safe.upper > risky.upper


def test_the_same_seed_gives_the_same_bounds():
    spectrum = torch.linspace(-1, 1, 50)
    assert bounds_of(spectrum, max_products=9, seed=3) == bounds_of(spectrum, max_products=9, seed=3)


@pytest.mark.parametrize("size", [2, 5, 40])
def test_an_operator_that_is_not_symmetric_is_refused(size):
    matrix = torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)
    with pytest.raises(RuntimeError, match=r"the Hessian must be symmetric, but entries differ by .* wrong second"):
        list(norm_bounds(lambda v: matrix @ v, size, generator=generator(), max_products=20))


def test_asymmetry_that_is_allowed_is_let_pass():
    matrix = torch.diag(torch.linspace(1, 2, 30, dtype=torch.float64))
    matrix[0, 1] = 1e-5
    assert len(list(norm_bounds(lambda v: matrix @ v, 30, generator=generator(), max_products=3, atol=1e-4))) == 3


def test_iterations_side_by_side_are_those_one_after_the_other():
    matrices = [torch.diag(torch.linspace(low, 1, 30, dtype=torch.float64)) for low in (-1.0, 0.0, 0.5)]
    alone = [
        list(norm_bounds(lambda v, matrix=matrix: matrix @ v, 30, generator=generator(seed), max_products=8))
        for seed, matrix in enumerate(matrices)
    ]
    iterations = [NormIteration(30, generator=generator(seed), max_products=8) for seed in range(3)]
    for number in range(8):
        products = [matrix @ iteration.vector for matrix, iteration in zip(matrices, iterations, strict=True)]
        assert next_bounds(iterations, products) == [bounds[number] for bounds in alone]
    assert all(iteration.is_finished for iteration in iterations)


def test_a_product_that_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="products with an operator must be finite"):
        list(norm_bounds(lambda v: v / 0, 5, generator=generator(), max_products=3))


@pytest.mark.parametrize("seed", range(5))
def test_the_forecast_of_a_bound_is_near_what_it_becomes(seed):
    bounds = bounds_of(torch.linspace(-1, 1, 300), max_products=8, seed=seed)
    # The logarithm of the bound, of which the start vector's part is spread over 2 and over 8 products.
    assert bounds[1].upper > 1e3 * bounds[-1].upper
    assert 0.1 < bounds[1].forecast / bounds[-1].upper < 10
    assert bounds[-1].forecast == bounds[-1].upper


def test_noise_of_another_operator_is_added_to_the_bound():
    diagonal, noise = torch.tensor([1.0, -3.0], dtype=torch.float64), 1e-3
    iteration = NormIteration(2, generator=generator(), max_products=2)
    next_bounds([iteration], [diagonal * iteration.vector])
    iteration.accept_noise(noise)
    # Off the diagonal by half of the noise on one side, so that the products are not those of a symmetric matrix.
    other = torch.diag(diagonal) + torch.tensor([[0.0, 0.5 * noise], [0.0, 0.0]], dtype=torch.float64)
    (bound,) = next_bounds([iteration], [other @ iteration.vector])
    assert bound.value == pytest.approx(3.0, abs=noise)
    assert bound.value + noise <= bound.upper <= bound.value + 3 * noise
