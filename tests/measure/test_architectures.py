"""The shapes of large networks at a small size, against singular values of the Jacobian that autograd forms whole."""

import pytest
import torch

from lightning_basin import measure_basin
from tests.architectures import GPT, Llama, ResNet, ViT
from tests.networks import built, drawn, generator_of


def tokens(seed):
    """Five sequences of six tokens, which are some of the 23 that there are."""
    return torch.randint(0, 23, (5, 6), generator=generator_of(seed))


NETWORKS = {
    "GPT-2": (GPT, tokens(0)),
    "GPT-2, not tied": (lambda: GPT(tied=False), tokens(1)),
    "ViT": (ViT, drawn(5, 3, 8, 8)),
    "Llama with LoRA": (Llama, tokens(2)),
    "ResNet-50": (ResNet, drawn(5, 3, 8, 8)),
}


def rows_by_autograd(module, inputs):
    """The gradients of each output of each input, by all trainable parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    outputs = module(inputs).flatten()
    rows = [torch.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True) for output in outputs]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])


def rank_of(matrix):
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-11 * values[0]).sum())


@pytest.mark.parametrize("is_repeated", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_of_the_network_and_of_layers_are_those_of_the_whole_jacobian(name, is_repeated):
    build, inputs = NETWORKS[name]
    module = built(build).double().eval()
    inputs = inputs[[0, 1, 2, 0, 1]] if is_repeated else inputs
    rows = rows_by_autograd(module, inputs)
    whole = measure_basin(module, inputs, layers=[], spectrum=False)
    assert (whole.gradient_rank, whole.layers) == (rank_of(rows), {})
    assert whole.duplicated_activations == whole.output_duplicated_activations == 2 * is_repeated
    record = measure_basin(module, inputs)
    assert record.gradient_rank == whole.gradient_rank
    widths = [layer.num_parameters for layer in record.layers.values()]
    assert [layer.gradient_rank for layer in record.layers.values()] == [*map(rank_of, rows.split(widths, dim=1))]
    # Five inputs of the network tell them apart wherever they enter a layer.
    assert not any("row by row" in note for note in record.notes)


@pytest.mark.parametrize("name", ["GPT-2", "GPT-2, not tied", "Llama with LoRA"])
def test_directions_of_independent_outputs_are_independent(name):
    build, inputs = NETWORKS[name]
    module = built(build).double().eval()
    rank = rank_of(rows_by_autograd(module, inputs))
    record = measure_basin(module, inputs, layers=[], spectrum=False, max_outputs=4)
    # All logits of an input are those of fewer features: four directions of them still are independent.
    assert rank >= record.gradient_rank == 5 * 4


@pytest.mark.parametrize("spectrum", [True, False])
@pytest.mark.parametrize("name", ["GPT-2", "ViT", "Llama with LoRA"])
def test_a_module_that_holds_layers_is_measured_as_a_block(name, spectrum):
    build, inputs = NETWORKS[name]
    module = built(build).double().eval()
    rows = rows_by_autograd(module, inputs)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    widths = [module.get_parameter(name).numel() for name in names]
    columns = zip(names, rows.split(widths, dim=1), strict=True)
    of_block = torch.cat([part for name, part in columns if name.startswith("blocks.1.")], dim=1)
    record = measure_basin(module, inputs, layers=["blocks.1"], spectrum=spectrum)
    assert record.layers == {}
    assert {name: block.gradient_rank for name, block in record.blocks.items()} == {"blocks.1": rank_of(of_block)}
    assert record.gradient_rank == rank_of(rows)
