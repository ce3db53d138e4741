"""Brackets against all eigenvalues of Hessians that torch.func and numpy compute."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_basin import measure_basin
from lightning_basin.functional import bracket
from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.quantities.hessian import products, quadratic_model
from tests.networks import drawn, filled

LOSSES = {
    "mean squares": lambda f, y: F.mse_loss(f, y),
    "sum of squares": lambda f, y: (f - y).square().sum(),
    "weighted squares": lambda f, y: ((f - y).square() * torch.arange(1, 1 + f.shape[1])).sum(),
    "soft labels": lambda f, y: F.cross_entropy(f, y.softmax(1)),
    "smoothed labels": lambda f, y: F.cross_entropy(f, y.argmax(1), label_smoothing=0.2),
    "hard labels": lambda f, y: F.cross_entropy(f, y.argmax(1), reduction="sum"),
    "class weights": lambda f, y: F.cross_entropy(f, y.argmax(1), weight=torch.arange(1.0, 1 + f.shape[1]).to(f)),
    "binary": lambda f, y: F.binary_cross_entropy_with_logits(f, y.sigmoid()),
    "huber": lambda f, y: F.huber_loss(f, y),
    "coupled": lambda f, y: (f - y).square().sum() + (f - y).sum().square(),
    "cosh": lambda f, y: (f - y).cosh().sum(),
}


def random_case(seed):
    """A small network, inputs, a loss, and targets near the outputs by a random distance."""
    random = np.random.default_rng(seed)
    widths = [int(random.integers(1, 5)) for _ in range(int(random.integers(1, 3)))]
    d, c, k = int(random.integers(1, 4)), int(random.integers(2, 4)), int(random.integers(2, 7))
    parts = []
    for before, after in zip([d, *widths[:-1]], widths, strict=True):
        parts += [nn.Linear(before, after), (nn.Tanh, nn.ReLU, nn.GELU, nn.Identity)[random.integers(4)]()]
    module = filled(nn.Sequential(*parts, nn.Linear(widths[-1], c)), seed)
    inputs = drawn(k, d, seed=seed + 1)
    distance = 10.0 ** random.uniform(-9, 0.5)
    targets = module(inputs).detach() + distance * drawn(k, c, seed=seed + 2)
    return module, inputs, targets, list(LOSSES)[seed % len(LOSSES)]


def true_eigenvalues(module, inputs, targets, loss_fn):
    """All eigenvalues of H in magnitude, and the norm of R = H - P, from forward-mode Hessians."""
    names = [name for name, _ in module.named_parameters()]
    shapes = [parameter.shape for parameter in module.parameters()]
    sizes = [parameter.numel() for parameter in module.parameters()]
    flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    def outputs(vector):
        parts = vector.split(sizes)
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional_call(module, values, (inputs,))

    at = outputs(flat)
    curved = torch.func.hessian(lambda vector: loss_fn(outputs(vector), targets))(flat).numpy()
    jacobian = torch.func.jacrev(outputs)(flat).reshape(at.numel(), -1).numpy()
    inner = torch.func.hessian(lambda f: loss_fn(f, targets))(at).reshape(at.numel(), at.numel()).numpy()
    residual = np.abs(np.linalg.eigvalsh(curved - jacobian.T @ inner @ jacobian)).max()
    return np.abs(np.linalg.eigvalsh(curved)), residual


def assert_bracket_holds(seed):
    module, inputs, targets, loss = random_case(seed)
    eigenvalues, residual = true_eigenvalues(module, inputs, targets, LOSSES[loss])
    rounding = 1e-14 * eigenvalues.max()
    record = measure_basin(module, inputs, targets, loss_fn=LOSSES[loss], hessian="bracket", layers=[])
    assert record.hessian_nullity_lower <= record.hessian_nullity_upper
    assert record.residual_curvature * record.hessian_largest >= residual - rounding
    # Eigenvalues may be the norm of R itself, up to rounding: where R acts in the null space of P.
    assert record.hessian_nullity_lower <= (eigenvalues <= residual + rounding).sum(), (seed, loss)
    if residual > rounding:  # Else all eigenvalues do not resolve what the bracket does.
        assert (eigenvalues <= residual - rounding).sum() <= record.hessian_nullity_upper, (seed, loss)
    if record.hessian_largest is not None:
        assert record.hessian_largest == pytest.approx(eigenvalues.max(), rel=1e-3)
    return record.hessian_certified


@pytest.mark.parametrize("seed", range(44))
def test_the_bracket_holds_all_eigenvalues(seed):
    assert_bracket_holds(seed)


@pytest.mark.slow
def test_the_bracket_holds_all_eigenvalues_of_five_hundred_networks():
    certified = sum(assert_bracket_holds(seed) for seed in range(44, 544))
    assert certified > 100  # Distances reach from 1e-9 to 3: neither end of the bracket is empty words.


def tanh_network(seed):
    return filled(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)), seed)


@pytest.mark.long
def test_the_share_that_is_certified_grows_to_all_as_the_loss_falls():
    shares = []
    for digits in range(1, 11, 3):
        records = []
        for seed in range(6):
            module, inputs = tanh_network(seed), drawn(5, 3, seed=seed + 100)
            targets = module(inputs).detach() + 10.0**-digits * drawn(5, 1, seed=seed + 200)
            records.append(measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket", layers=[]))
        assert all(r.hessian_nullity == r.gradient_nullity == 26 for r in records if r.hessian_certified)
        shares.append(sum(record.hessian_certified for record in records))
    # Losses of 1e-2 to 1e-20.
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] == 6


def test_training_below_the_stated_loss_certifies():
    module, inputs = tanh_network(0), drawn(5, 3, seed=100)
    outputs, away = module(inputs).detach(), drawn(5, 1, seed=200)

    def measured(distance):
        return measure_basin(
            module, inputs, outputs + distance * away, loss_fn=nn.MSELoss(), hessian="bracket", layers=[]
        )

    record = measured(1.0)
    assert not record.hessian_certified
    # The loss falls with the square of the distance; "about", as R's bound is known within a factor of two.
    below = (record.hessian_resolving_loss / record.loss) ** 0.5
    assert measured(0.5 * below).hessian_certified
    assert not measured(4 * below).hessian_certified


@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_networks_have_brackets(size):
    module = filled(nn.Linear(1, size, bias=False))
    record = measure_basin(module, drawn(3, 1), drawn(3, size, seed=1), loss_fn=nn.MSELoss(), hessian="bracket")
    # Outputs are linear in the parameters: R = 0 at any residual.
    assert (record.hessian_nullity, record.hessian_nullity_strict, record.hessian_negative) == (0, 0, 0)
    assert record.residual_curvature == 0.0


def test_layers_in_whose_weights_outputs_are_piecewise_linear_have_no_residual_curvature():
    module = filled(nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)))
    inputs, targets = drawn(6, 1, 5, 5), drawn(6, 2, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    assert record.residual_curvature > 0
    for layer in record.layers.values():
        assert (layer.residual_curvature, layer.hessian_certified) == (0.0, True)
        assert layer.hessian_nullity == layer.hessian_nullity_strict == layer.gradient_nullity


def test_a_smooth_layer_has_residual_curvature_of_its_own():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    record = measure_basin(module, drawn(5, 3), drawn(5, 2, seed=1), loss_fn=nn.MSELoss(), hessian="bracket")
    assert record.layers["0"].residual_curvature > 0
    assert record.layers["2"].residual_curvature == 0.0


def test_brackets_of_layers_hold_the_eigenvalues_of_their_blocks():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    inputs, targets = drawn(6, 3), module(drawn(6, 3)).detach() + 1e-4 * drawn(6, 2, seed=1)
    settings = {"loss_fn": nn.MSELoss()}
    found = measure_basin(module, inputs, targets, hessian="bracket", **settings)
    dense = measure_basin(module, inputs, targets, hessian="dense", **settings)
    for name, layer in found.layers.items():
        assert layer.hessian_nullity_lower <= dense.layers[name].hessian_nullity <= layer.hessian_nullity_upper
        assert layer.residual_curvature >= dense.layers[name].residual_curvature * (1 - 1e-3)


def test_chunks_change_nothing_but_rounding(monkeypatch):
    module = filled(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)))
    inputs, targets = drawn(7, 3), drawn(7, 2, seed=1)
    whole = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    monkeypatch.setattr(quadratic_model, "_GRAPH_ELEMENTS", 20)
    chunked = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    assert chunked.residual_curvature == pytest.approx(whole.residual_curvature, rel=1e-9)
    assert chunked.hessian_largest == pytest.approx(whole.hessian_largest, rel=1e-9)


def test_a_large_network_has_a_bracket():
    module = filled(nn.Sequential(nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 3)))
    inputs = drawn(4, 60)
    targets = module(inputs).detach() + 1e-9 * drawn(4, 3, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss())
    assert (record.hessian_method, record.hessian_certified) == ("bracket", True)
    assert record.hessian_nullity == record.gradient_nullity == record.num_parameters - 12


@pytest.mark.parametrize("seed", range(8))
def test_a_sketch_does_not_overstate_singular_values_by_more_than_the_certificate_allows(seed):
    k, c = ((10, 2), (30, 3), (20, 1), (5, 4))[seed % 4]
    decay = torch.logspace(0, -4, k, dtype=torch.float64).view(k, 1, 1)
    factored = KhatriRaoGradients(decay * drawn(k, 1, 30, seed=seed), drawn(k, c, 1, 20, seed=seed + 50))
    exact = torch.from_numpy(np.linalg.svd(factored.rows().numpy(), compute_uv=False))
    for gradients in (factored, DenseGradients(factored.rows())):
        found = torch.linalg.svdvals(gradients.sketch(2 * k * c, torch.Generator().manual_seed(seed)))
        assert (found / exact).max() < bracket.SKETCH_FACTOR


@pytest.fixture
def sizes_of_products(monkeypatch):
    """The number of parameters of the block with which each product was taken."""
    sizes, take = [], products.hessian_product

    def noted(gradient, variables, direction):
        sizes.append(len(direction))
        return take(gradient, variables, direction)

    monkeypatch.setattr(products, "hessian_product", noted)
    return sizes


def test_some_ten_products_certify_a_good_fit_and_one_each_its_layers(sizes_of_products):
    module = filled(nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3)))
    inputs = drawn(4, 30)
    targets = module(inputs).detach() + 1e-9 * drawn(4, 3, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss())
    assert record.hessian_certified
    assert all(layer.hessian_certified for layer in record.layers.values())
    # A bound within a factor of two would take 15.
    assert sizes_of_products.count(1023) <= 12
    assert sorted(size for size in sizes_of_products if size < 1023) == [93, 930]


# Noise in the targets: in the first case a better bound could show an eigenvalue or none, in the second none at all.
@pytest.mark.parametrize(("noise", "slack"), [(0.5, 4), (100.0, 10)])
def test_a_poor_fit_takes_fewer_products_for_a_bound_that_closes_no_bracket(sizes_of_products, noise, slack):
    module = filled(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10)))
    inputs = drawn(10, 12)
    targets = module(inputs).detach() + noise * drawn(10, 10, seed=1)
    settings = {"loss_fn": nn.MSELoss(), "layers": []}
    record = measure_basin(module, inputs, targets, hessian="bracket", **settings)
    # To a factor of two R alone would take three more.
    assert len(sizes_of_products) <= 20
    formed = measure_basin(module, inputs, targets, hessian="dense", **settings)
    norm, formed_norm = (found.residual_curvature * found.hessian_largest for found in (record, formed))
    assert formed_norm <= norm <= slack * formed_norm
    assert record.hessian_nullity_lower <= formed.hessian_nullity <= record.hessian_nullity_upper


def test_no_product_is_taken_where_the_hessian_is_formed(sizes_of_products):
    module = filled(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)))
    inputs = drawn(5, 3)
    targets = module(inputs).detach() + 1e-9 * drawn(5, 2, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss())
    assert (record.hessian_method, record.hessian_certified) == ("dense", True)
    assert record.hessian_nullity == record.gradient_nullity
    assert sizes_of_products == []


def test_layers_take_no_product_that_may_change_no_count(sizes_of_products):
    # Far from a fit no bound on a layer's part of R leaves an eigenvalue of P above twice of it.
    module = filled(nn.Sequential(*(nn.Sequential(nn.Linear(9, 9), nn.Tanh()) for _ in range(14)), nn.Linear(9, 2)))
    inputs = drawn(6, 9)
    record = measure_basin(module, inputs, 1e3 * drawn(6, 2, seed=1), loss_fn=nn.MSELoss(), hessian="bracket")
    inner = [layer for name, layer in record.layers.items() if name != "14"]
    assert all(layer.hessian_nullity_upper == layer.num_parameters for layer in inner)
    # The layers may take six each.
    assert len([size for size in sizes_of_products if size <= 90]) <= 2 * 15


class Sum(nn.Module):
    """Outputs x . a, and the same quadratic form of b for each input; with P = 1 for a alone, and R = D for b alone."""

    def __init__(self, num_inputs, curvatures):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2000)), nn.Parameter(torch.zeros(len(curvatures)))
        self.register_buffer("curvatures", curvatures)
        # Rows with products of 1, 1/2, 1/3, ... each with itself, and 0 with each other.
        self.register_buffer("rows", torch.eye(num_inputs, 2000) / torch.arange(1, num_inputs + 1).sqrt()[:, None])

    def forward(self, numbers):
        form = 0.5 * (self.curvatures * self.b.square()).sum()
        return torch.stack([self.rows[numbers] @ self.a, form.expand(len(numbers))], dim=1)


@pytest.mark.parametrize("extreme", [1e-2, 0.5, 0.9, 1.01, 1.5, 40.0, -0.5, -1.01, -3.0])
def test_the_largest_eigenvalue_may_be_that_of_either_part(extreme):
    module = Sum(110, extreme * 0.9 ** torch.arange(300)).double()
    # The slopes at the second output add up to 1, so that R is the diagonal of curvatures.
    targets = torch.tensor([0.0, -1 / 110], dtype=torch.float64).expand(110, 2)
    record = measure_basin(
        module,
        torch.arange(110),
        targets,
        loss_fn=lambda f, y: 0.5 * (f - y).square().sum(),
        hessian="bracket",
        layers=[],
    )
    assert record.hessian_largest == pytest.approx(max(1, abs(extreme)), rel=1e-3)
    norm = record.residual_curvature * record.hessian_largest
    num_above = sum(1 / number > 2 * abs(extreme) for number in range(1, 111))
    # Within a factor of two where this may show eigenvalues of P that are above twice the norm.
    assert abs(extreme) <= norm <= (2 if num_above else 10) * abs(extreme)
    assert record.hessian_nullity_lower == 2300 - 110
    assert (
        2300 - num_above <= record.hessian_nullity_upper <= 2300 - sum(n * 4 * abs(extreme) < 1 for n in range(1, 111))
    )


@pytest.mark.long
@pytest.mark.parametrize("loss", ["mean squares", "soft labels", "hard labels", "huber", "coupled"])
def test_some_twelve_products_bound_both_norms_far_from_a_fit(loss, sizes_of_products):
    module = filled(nn.Sequential(nn.Linear(20, 45), nn.Tanh(), nn.Linear(45, 10)))
    inputs, targets = drawn(13, 20), 10 * drawn(13, 10, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=LOSSES[loss], hessian="bracket", layers=[])
    eigenvalues, residual = true_eigenvalues(module, inputs, targets, LOSSES[loss])
    assert record.hessian_largest == pytest.approx(eigenvalues.max(), rel=1e-3)
    assert 1 <= record.residual_curvature * record.hessian_largest / residual <= 10
    # Eight or nine with R, and at least five with H, less those that Temple's bound saves; from a random vector three
    # more.
    assert len(sizes_of_products) <= 14


def test_a_resolving_loss_is_as_near_where_the_bound_is_not():
    module = filled(nn.Sequential(nn.Linear(20, 45), nn.Tanh(), nn.Linear(45, 10)))
    inputs, away = drawn(13, 20), drawn(13, 10, seed=1)

    def measured(distance):
        targets = module(inputs).detach() + distance * away
        return measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket", layers=[])

    far = measured(100.0)
    assert not far.hessian_certified
    below = 100 * (far.hessian_resolving_loss / far.loss) ** 0.5
    assert measured(0.5 * below).hessian_certified
    assert not measured(4 * below).hessian_certified
