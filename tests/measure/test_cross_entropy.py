import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_basin import measure_basin
from tests.exact import ExactNetwork, exact_rank, integers, jacobian
from tests.measure.records import every_case
from tests.models import Chain, with_integer_weights
from tests.networks import generator_of


def centred(gradients: np.ndarray, num_outputs: int) -> np.ndarray:
    """c times the gradients of the logits less their mean over the outputs of an input: whole numbers again."""
    rows = gradients.reshape(-1, num_outputs, gradients.shape[-1])
    return (num_outputs * rows - rows.sum(1, keepdims=True)).reshape(gradients.shape)


def classifier(*, margin: int, seed: int) -> tuple[ExactNetwork, np.ndarray, Chain, Tensor]:
    """An integer network with 3 logits, of which the first leads by ``margin``."""
    module = with_integer_weights(Chain(2, 4, 3), generator_of(seed), largest=1)
    with torch.no_grad():
        module.layers[1].bias.copy_(torch.tensor([float(margin), 0.0, 0.0]))
    inputs = torch.randint(-1, 2, (6, 2), generator=generator_of(seed)).float()
    network = ExactNetwork(module)
    return network, jacobian(module.exact(network, integers(inputs))), module, inputs


@pytest.mark.parametrize("margin", [0, 3, 18, 30])
@every_case
def test_gauss_newton_nullity_of_cross_entropy_leaves_the_rank_of_centred_logits(margin, seed):
    network, gradients, module, inputs = classifier(margin=margin, seed=seed)
    targets = torch.zeros(len(inputs), dtype=torch.long)
    record = measure_basin(module, inputs, targets, loss_fn=nn.functional.cross_entropy)
    expected = exact_rank(centred(gradients, 3))
    assert expected < exact_rank(gradients)
    assert record.gauss_newton_nullity == network.num_parameters - expected


def test_probabilities_of_the_margin_18_are_nearly_saturated():
    # What the test above is for: 1 - p near 1e-8, where p - p**2 keeps half of the digits.
    _, _, module, inputs = classifier(margin=18, seed=0)
    rest = 1 - module.double()(inputs.double()).softmax(1)[:, 0].detach()
    assert 1e-10 < float(rest.min()) < 1e-7


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])),
        lambda outputs, targets: nn.functional.nll_loss(outputs.log_softmax(1), targets),
    ],
    ids=["mean", "smoothed sum", "weighted", "written out"],
)
def test_every_spelling_of_cross_entropy_has_the_same_gauss_newton_nullity(loss_fn):
    network, gradients, module, inputs = classifier(margin=18, seed=1)
    targets = torch.tensor([0, 0, 1, 0, 2, 0])
    record = measure_basin(module, inputs, targets, loss_fn=loss_fn)
    assert record.gauss_newton_nullity == network.num_parameters - exact_rank(centred(gradients, 3))


def test_soft_labels_equal_to_the_probabilities_leave_no_residual():
    network, gradients, module, inputs = classifier(margin=1, seed=0)
    targets = module.double()(inputs.double()).softmax(1).detach()
    record = measure_basin(module, inputs, targets, loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    assert record.residual_curvature < 1e-14
    assert record.hessian_nullity == network.num_parameters - exact_rank(centred(gradients, 3))


@pytest.mark.parametrize("margin", [1.0, 6.0, 12.0, 18.0, 25.0])
@pytest.mark.parametrize("layout", ["tokens last", "classes second", "flat"])
def test_cross_entropy_of_tokens_sees_the_centred_logits_at_any_margin(layout, margin):
    # 12 tokens of 3 classes: the centred logits have 2 dimensions each, and the 31 parameters see all 24 of them.
    generator = torch.Generator().manual_seed(0)
    body, head = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*body.parameters(), *head.parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        head.bias.copy_(torch.tensor([margin, 0.0, -1.0]))
    module = nn.Sequential(body, nn.Tanh(), head)
    inputs = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    targets = torch.zeros(4, 3, dtype=torch.int64)
    if layout == "flat":
        inputs, targets, loss_fn, behavior = inputs.flatten(0, 1), targets.flatten(), nn.CrossEntropyLoss(), None
    elif layout == "tokens last":
        behavior = None

        def loss_fn(outputs, labels):
            return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())
    else:
        loss_fn = nn.CrossEntropyLoss()

        def behavior(network, tokens):
            return network(tokens).mT

    record = measure_basin(module, inputs, targets, loss_fn=loss_fn, behavior=behavior)
    assert record.num_parameters - record.gauss_newton_nullity == 24
    # Adding one number to all logits changes nothing: 4 directions in the head's weight and 1 in its bias, exactly.
    assert record.hessian_nullity_strict == 5
    plain = measure_basin(module, inputs, behavior=lambda network, x: centred_logits(network(x)))
    assert plain.gradient_rank == 24


def centred_logits(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)
