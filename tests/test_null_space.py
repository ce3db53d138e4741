"""The fractions of the theory page: 1 on a manifold, 0 at the point where two spheres touch."""

import pytest
import torch
from torch import nn

from lightning_basin import Probe, measure_basin, neural_tangent_kernel, verify_null_space
from tests.models import Crossing, SquaredDistances
from tests.networks import drawn, filled

CENTRES = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)


def deep_linear(*weights):
    layers = [nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype) for weight in weights]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
    return nn.Sequential(*layers)


def merged_categories(seed):
    """The 16-1-16-1 network of 8 x 8 pairs, with the first layer blind to the second category."""
    network = filled(nn.Sequential(nn.Linear(16, 1), nn.Tanh(), nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), seed)
    with torch.no_grad():
        network[0].weight[:, 8:] = 0.25
    codes = torch.eye(8, dtype=torch.float64)
    return network, torch.cat([codes.repeat_interleave(8, 0), codes.repeat(8, 1)], dim=1)


def test_every_null_direction_of_generic_weights_survives():
    # 4-3-5 at generic weights: rank 3 (4 + 5 - 3) = 18 of 27 parameters, 9 of them free (invertible 3 x 3 matrices).
    module = deep_linear(drawn(3, 4), drawn(5, 3, seed=1))
    verification = verify_null_space(module, drawn(12, 4, seed=2))
    assert verification.nullity == 9
    assert verification.surviving_fraction > 0.999


def test_no_null_direction_survives_where_two_spheres_touch():
    # Rank 1 leaves two null directions, but the manifold is a point.
    verification = verify_null_space(SquaredDistances((0.3, 0.0, 0.0)), CENTRES)
    assert verification.nullity == 2
    assert max(verification.surviving_fractions) < 0.01


def test_null_directions_off_the_axis_of_the_spheres_survive():
    verification = verify_null_space(SquaredDistances((0.3, 0.5, 0.2)), CENTRES)
    assert verification.nullity == 1
    assert verification.surviving_fraction > 0.999


def test_a_part_of_the_step_survives_at_a_crossing():
    # On the cross x y = 0 the nearest point is on one of the axes: what survives is the larger component's square.
    verification = verify_null_space(Crossing((0.0, 0.0)), torch.ones(1, 1, dtype=torch.float64))
    assert verification.nullity == 2
    assert all(0.3 < fraction < 0.99 for fraction in verification.surviving_fractions)


def test_not_every_null_direction_survives_at_deficient_weights():
    narrow = drawn(2, 1) @ drawn(1, 4, seed=1), drawn(3, 1, seed=2) @ drawn(1, 2, seed=3)
    verification = verify_null_space(deep_linear(*narrow), drawn(12, 4, seed=4), num_directions=8)
    assert verification.nullity == 8
    assert verification.surviving_fraction < 0.95


@pytest.mark.parametrize("seed", range(3))
def test_null_directions_of_merged_inputs_survive(seed):
    # The gradients gain rank under any jitter, and yet the 51 dimensions are real.
    module, pairs = merged_categories(seed)
    verification = verify_null_space(module, pairs)
    assert verification.nullity == 51
    assert verification.surviving_fraction > 0.999


def test_nullity_is_that_of_the_record():
    module, inputs = filled(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))), drawn(6, 3)
    assert verify_null_space(module, inputs).nullity == measure_basin(module, inputs).gradient_nullity


def test_without_a_null_space_there_is_nothing_to_verify():
    verification = verify_null_space(filled(nn.Linear(2, 1)), drawn(5, 2))
    assert (verification.nullity, verification.surviving_fractions) == (0, ())
    assert verification.surviving_fraction == 1.0


def test_more_gradients_than_fit_are_refused_with_the_probe_that_would_fit():
    # 2^15 parameters leave room for 2^27 / 2^15 / 2^4 = 2^8 inputs with 16 outputs.
    module = nn.Linear(2**11, 2**4, bias=False)
    with pytest.raises(ValueError, match="300 inputs x 16 outputs x 32768 parameters: take a probe of at most 256"):
        verify_null_space(module, torch.zeros(300, 2**11))


def test_the_module_does_not_move():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    verify_null_space(module, drawn(4, 3))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_same_seed_gives_the_same_directions():
    module, inputs = SquaredDistances((0.3, 0.1, 0.2)), CENTRES
    assert verify_null_space(module, inputs, seed=1) == verify_null_space(module, inputs, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_directions": 0}, "num_directions must be at least 1"),
        ({"step": 0.0}, "step must be inside"),
        ({"step": 1.0}, "step must be inside"),
        ({"rtol": 2.0}, "rtol must be a relative tolerance inside"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        verify_null_space(nn.Linear(2, 1), torch.zeros(3, 2), **settings)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear, "module must be a torch.nn.Module, got the class Linear: pass an instance"),
        (torch.zeros(3, 2), "module must be a torch.nn.Module, got Tensor: pass the module first"),
    ],
    ids=["class", "other order"],
)
@pytest.mark.parametrize("function", [verify_null_space, neural_tangent_kernel])
def test_arguments_in_another_order_are_refused(function, module, message):
    with pytest.raises(TypeError, match=message):
        function(module, nn.Linear(2, 1) if isinstance(module, torch.Tensor) else torch.zeros(3, 2))


def test_direction_that_is_free_everywhere_has_converged():
    # Three inputs see three of the six directions of each output: the others change nothing, however far.
    verification = verify_null_space(nn.Linear(5, 2), torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    assert verification.nullity == 2 * (6 - 3)
    assert verification.converged
    assert verification.surviving_fraction == pytest.approx(1.0)


def test_probe_with_strings_is_verified_though_it_cannot_be_run_input_by_input():
    scales = {"once": 1.0, "twice": 2.0}

    def behavior(module, inputs):
        return module(inputs[0]) * torch.tensor([[scales[word]] for word in inputs[1]])

    probe = Probe((drawn(3, 5), ["once", "twice", "once"]))
    verification = verify_null_space(nn.Linear(5, 2), probe, behavior=behavior)
    # As above: scaled rows span the same directions.
    assert verification.nullity == 2 * (6 - 3)
    assert verification.surviving_fraction == pytest.approx(1.0)
