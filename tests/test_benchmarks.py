"""The ways of the benchmark compute what is known on paper about its smallest networks, and say what is missing."""

import os
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import tables, timing
from benchmarks.duplicates import DUPLICATES
from benchmarks.hessians import PRODUCTS, all_eigenvalues, certified_nullity, double_backward
from benchmarks.networks import PAIRS, RANKED, REPEATED
from benchmarks.ours import OURS, RANKS, STEP
from benchmarks.peers import PEERS
from benchmarks.timing import Way, difference, fingerprint, measure, run

SEED = RANKED["seed"]


def results(way, workload):
    """By stage, in float64; skips a way whose package is not installed."""
    obstacle = way.obstacle(workload, torch.float64)
    if obstacle is not None:
        pytest.skip(obstacle)
    stages = run(way, workload.module(torch.float64), workload.probe(torch.float64))
    return {name: stage.result for name, stage in stages.items()}


@pytest.mark.parametrize("way", [*RANKS, *PEERS], ids=lambda way: way.name)
def test_all_ways_compute_the_ranks_of_the_smallest_network(way):
    # 18 different inputs of one output each: rank 18, by the first layer alone too; the last layer has 11 parameters.
    stages = results(way, REPEATED["seed-repeated"])
    assert stages.get("rank", 18) == 18
    assert stages.get("layers", (18, 18, 11)) == (18, 18, 11)
    assert stages.keys() & {"rank", "layers"}


@pytest.mark.parametrize("way", [OURS[0], *PEERS[1:]], ids=lambda way: way.name)
def test_all_ways_form_the_same_gram_matrix(way):
    module, inputs = SEED.module(torch.float64), SEED.probe(torch.float64)
    rows = []
    for output in module(inputs).flatten():
        gradients = torch.autograd.grad(output, list(module.parameters()), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    matrix = torch.stack(rows)
    assert difference(results(way, SEED)["gram"], fingerprint(matrix @ matrix.mT)) < 1e-12


@pytest.mark.parametrize("way", PRODUCTS, ids=lambda way: way.name)
def test_all_ways_multiply_with_the_same_hessian(way):
    # The quotient of differences of gradients at 1e-4 has an error of 1e-8 times fourth derivatives.
    module, inputs = SEED.module(torch.float64), SEED.probe(torch.float64)
    parameters = list(module.parameters())
    flat = torch.nn.utils.parameters_to_vector(parameters).detach()
    targets, direction = torch.ones(20, 1).double(), torch.linspace(-1, 1, flat.numel()).double()
    gradients = []
    for step in (1e-4, -1e-4):
        torch.nn.utils.vector_to_parameters(flat + step * direction, parameters)
        loss = torch.nn.functional.mse_loss(module(inputs), targets)
        gradients.append(torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters)))
    torch.nn.utils.vector_to_parameters(flat, parameters)
    product = double_backward(module, inputs, targets)(direction.unsqueeze(0))[0]
    assert torch.allclose((gradients[0] - gradients[1]) / 2e-4, product, atol=1e-7)
    assert difference(results(way, SEED)["products"], results(PRODUCTS[0], SEED)["products"]) < 1e-12


def test_flat_directions_are_counted_as_by_all_eigenvalues():
    (ours,), (truth,) = (
        [result for _, result in way(SEED.module(torch.float64), SEED.probe(torch.float64))]
        for way in (certified_nullity, all_eigenvalues)
    )
    assert ours.startswith(f"{truth}; certified: ")


@pytest.mark.parametrize("way", DUPLICATES, ids=lambda way: way.name)
def test_duplicates_of_pairs_are_half_of_the_activations(way):
    expected = 0 if way.name == "torch.unique" else 20
    assert results(way, replace(PAIRS["pairs"], num_inputs=40)) == {"duplicates": expected}


def test_a_peer_that_is_not_installed_is_a_row_that_says_so():
    way = Way("absent", STEP.run, "no-such-peer", (torch.float32,))
    candidates = measure(SEED, [way], rounds=1, threads=1)
    assert [candidate.note for candidate in candidates] == ["no-such-peer is not installed"]
    assert tables.table(candidates, ["rank"], tables.text).endswith(
        "| absent | float32 |  |  |  | no-such-peer is not installed |\n"
    )


@pytest.mark.slow
def test_a_process_takes_a_turn_in_every_round():
    (candidate,) = measure(SEED, [STEP], rounds=2, threads=1)
    assert candidate.note is None
    assert [list(turn) for turn in candidate.turns] == [["rank"]] * 3


def dies(module, inputs):
    os._exit(1)


def never_ends(module, inputs):
    time.sleep(60.0)
    yield "rank", None


def fails(module, inputs):
    raise NotImplementedError("no such layer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "note"),
    [(dies, "given up after 5 s"), (never_ends, "given up after 5 s"), (fails, "NotImplementedError: no such layer")],
)
def test_a_way_that_fails_is_given_up(way, note, monkeypatch):
    monkeypatch.setattr(timing, "PATIENCE", 5.0)
    candidates = measure(SEED, [Way("broken", way, dtypes=(torch.float32,)), STEP], rounds=1, threads=1)
    assert [(candidate.note, len(candidate.turns)) for candidate in candidates] == [(note, 0), (None, 2)]


def test_a_fingerprint_tells_how_far_tensors_are_apart():
    tensor = torch.arange(12.0).view(3, 4)
    assert difference(fingerprint(tensor), fingerprint(tensor)) == 0.0
    assert difference(fingerprint(1.5 * tensor), fingerprint(tensor)) == pytest.approx(0.5, rel=1e-5)


def test_ranks_are_told_beside_ours():
    assert tables.ranks((18, 18, 11), (18, 18, 12)) == "18; 18 11, 1 unlike ours"
    assert tables.ranks((9, *range(9)), (9, *range(9))) == "9; sum 36 over 9 layers"
