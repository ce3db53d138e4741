import pytest
import torch
from torch import nn

from lightning_basin import Probe
from lightning_basin.functional.gradients import gram_of
from lightning_basin.network.network import Network
from tests.networks import Composed, drawn, filled, finite_differences, measured

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(2, 3, 3), (4, 2, 7)),
    "1d stride padding dilation": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (4, 2, 9)),
    "2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0)), (4, 2, 5, 6)),
    "2d same padding": (lambda: nn.Conv2d(2, 2, 3, padding="same", dilation=2), (3, 2, 6, 5)),
    "2d even kernel same padding": (lambda: nn.Conv2d(2, 2, 4, padding="same"), (3, 2, 5, 5)),
    "2d circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (3, 2, 5, 5)),
    "2d reflect": (lambda: nn.Conv2d(2, 2, 3, padding=(2, 1), padding_mode="reflect"), (3, 2, 5, 4)),
    "2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 4, 4)),
    "2d depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, bias=False), (3, 3, 4, 4)),
    "2d no bias": (lambda: nn.Conv2d(2, 3, 1, bias=False), (3, 2, 3, 3)),
    "3d": (lambda: nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), (3, 1, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3), (4, 2, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (3, 2, 3, 4)),
    "transposed 2d dilation": (lambda: nn.ConvTranspose2d(2, 1, 2, stride=(1, 3), dilation=2), (3, 2, 3, 3)),
    "transposed 2d groups": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=2, padding=1, bias=False), (3, 4, 3, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(1, 2, 2), (2, 1, 2, 3, 2)),
}


UNIT_BY_UNIT = {
    "LayerNorm": (lambda: nn.LayerNorm(4), (5, 3, 4)),
    "LayerNorm over two axes": (lambda: nn.LayerNorm((3, 4)), (5, 3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (5, 3, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(4), (5, 4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (5, 3, 2, 2)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (5, 4, 3)),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(3, affine=True), (5, 3, 3, 2)),
    "PReLU": (lambda: nn.PReLU(), (5, 4)),
    "PReLU by channel": (lambda: nn.PReLU(3), (5, 3, 4)),
}


LAYERS = {**CONVOLUTIONS, **UNIT_BY_UNIT}


def nonlinear(part):
    """The layer between two squares, so that neither what enters it nor what leaves it is special."""
    return filled(Composed(lambda m, x: m.part(x * x.abs() + x).square().flatten(1)[:, :4], part=part))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_a_layer_type_are_those_of_finite_differences(name):
    build, shape = LAYERS[name]
    network, probe = Network(nonlinear(build())), Probe(drawn(*shape))
    gradients = measured(network, probe)["part"]
    (layer,) = network.layers
    expected = finite_differences(network, probe, layer)
    assert gradients.structured
    torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
def test_gram_matrix_and_sketch_of_a_layer_type_are_those_of_its_rows(name):
    build, shape = LAYERS[name]
    gradients = measured(Network(nonlinear(build())), Probe(drawn(*shape)))["part"].gradients
    rows = gradients.rows()
    torch.testing.assert_close(gram_of(gradients).whole(), rows @ rows.mT)
    rank = int(torch.linalg.matrix_rank(rows))
    sketch = gradients.sketch(2 * rows.shape[0], torch.Generator().manual_seed(0))
    assert int(torch.linalg.matrix_rank(sketch)) == rank


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradients_of_an_embedding_are_those_of_finite_differences(padding_idx):
    module = Composed(
        lambda m, x: m.head(m.table(x).square().sum(1)),
        table=nn.Embedding(7, 3, padding_idx=padding_idx),
        head=nn.Linear(3, 2),
    )
    tokens = torch.tensor([[0, 2, 2], [5, 1, 0], [2, 5, 5], [1, 1, 2]])
    network, probe = Network(filled(module)), Probe(tokens)
    gradients = measured(network, probe)["table"]
    expected = finite_differences(network, probe, network.layers[0])
    if padding_idx is not None:  # Its gradient is zero by definition, though the outputs depend on it.
        expected.view(-1, 7, 3)[:, padding_idx] = 0
    assert gradients.structured
    rows = gradients.gradients.rows()
    torch.testing.assert_close(rows, expected, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(gram_of(gradients.gradients).whole(), rows @ rows.mT)


def test_gradients_of_a_bilinear_layer_are_those_of_finite_differences():
    module = filled(Composed(lambda m, x: m.part(x[:, :2], x[:, 2:]).square(), part=nn.Bilinear(2, 3, 2)))
    network, probe = Network(module), Probe(drawn(6, 5))
    gradients = measured(network, probe)["part"]
    expected = finite_differences(network, probe, network.layers[0])
    assert gradients.structured
    torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=1e-7, atol=1e-6)


def test_a_convolution_that_is_called_twice_sums_over_its_calls():
    module = filled(
        Composed(lambda m, x: m.part(m.part(x).tanh()).square().flatten(1)[:, :3], part=nn.Conv2d(2, 2, 3, padding=1))
    )
    network, probe = Network(module), Probe(drawn(4, 2, 4, 4))
    gradients = measured(network, probe)["part"]
    expected = finite_differences(network, probe, network.layers[0])
    assert gradients.structured
    torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=1e-7, atol=1e-6)


def test_frames_that_share_the_axis_of_the_batch_belong_to_their_input():
    def forward(module, clips):
        frames = module.part(clips.flatten(0, 1)).square()
        return frames.unflatten(0, clips.shape[:2]).sum((1, 3, 4))

    network = Network(filled(Composed(forward, part=nn.Conv2d(1, 2, 2))))
    probe = Probe(drawn(3, 4, 1, 3, 3))
    gradients = measured(network, probe)["part"]
    expected = finite_differences(network, probe, network.layers[0])
    assert gradients.structured
    torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=1e-7, atol=1e-6)


def test_the_order_in_which_a_weight_is_stored_changes_nothing():
    module = nonlinear(nn.Conv2d(2, 3, (3, 2)))
    network, probe = Network(module), Probe(drawn(4, 2, 5, 6))
    expected = finite_differences(network, probe, network.layers[0])
    module.part.weight.data = module.part.weight.data.contiguous(memory_format=torch.channels_last)
    gradients = measured(network, probe)["part"]
    assert gradients.structured
    torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


def test_elements_of_a_vector_can_be_looked_up():
    module = Composed(lambda m, x: m.scale.weight[0][x].square().cumsum(1), scale=nn.Linear(7, 1, bias=False))
    network, probe = Network(filled(module)), Probe(torch.tensor([[0, 2, 2], [5, 1, 0], [2, 6, 5]]))
    gradients = measured(network, probe)["scale"]
    expected = finite_differences(network, probe, network.layers[0])
    assert gradients.structured
    torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=1e-7, atol=1e-6)


def test_a_frozen_bias_leaves_the_weight():
    part = nn.Conv2d(1, 2, 2)
    part.bias.requires_grad_(requires_grad=False)
    network, probe = Network(nonlinear(part)), Probe(drawn(3, 1, 3, 3))
    gradients = measured(network, probe)["part"]
    expected = finite_differences(network, probe, network.layers[0])
    assert gradients.gradients.num_columns == 8
    torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=1e-7, atol=1e-6)


SPARSE = {
    "input": lambda m, x: m.head((x.to_sparse() @ m.part.weight).square()),
    "compressed input": lambda m, x: m.head((x.to_sparse_csr() @ m.part.weight).square()),
    "made of indices": lambda m, x: m.head((one_hot_in(x.new_ones, x) @ m.part.weight).square()),
    "made dense": lambda m, x: m.head(m.part(one_hot_in(x.new_ones, x).to_dense()).square()),
    "hidden": lambda m, x: m.head(m.part(x).square().to_sparse().to_dense()),
    "written into": lambda m, x: m.head(((x * 0).to_sparse().add_(x.to_sparse()) @ m.part.weight).square()),
}


def one_hot_in(ones, x):
    """A sparse matrix with a one in each row."""
    places = torch.stack([torch.arange(len(x)), (x[:, 0] > 0).long()])
    return torch.sparse_coo_tensor(places, ones(len(x)), (len(x), 4), check_invariants=True)


@pytest.mark.parametrize("function", SPARSE.values(), ids=SPARSE)
def test_gradients_behind_sparse_tensors_are_those_of_finite_differences(function):
    module = filled(Composed(function, part=nn.Linear(4, 4), head=nn.Linear(4, 2)))
    network, probe = Network(module), Probe(drawn(5, 4))
    for name, gradients in measured(network, probe).items():
        layer = next(layer for layer in network.layers if layer.name == name)
        assert gradients.structured
        expected = finite_differences(network, probe, layer)
        torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=1e-7, atol=1e-6)
