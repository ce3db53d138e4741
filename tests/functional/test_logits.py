"""Cross-entropies of log-probabilities and probabilities: one function, one Hessian, however it is written."""

import mpmath
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, measure_basin
from lightning_basin.functional.logits import canonical_loss
from tests.fuzz_brackets import Link, check_bracket
from tests.lightning_packages import LightningModule
from tests.networks import drawn, filled
from tests.training import make_trainer, seeded

LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


POSITIONS = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 0], [2, 2], [1, 0]])


IGNORED = torch.tensor([-100, 2, 1, -100, 0, 2])


WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


SOFT = drawn(6, 3, seed=3).softmax(1)


MANY = (drawn(6, 6, seed=4) > 0).double()


def heads(f, loss):
    """Two heads, and squared errors beside them."""
    return loss(f[:, :3], LABELS) + 0.5 * loss(f[:, 3:5], LABELS.clamp(max=1)) + f[:, 5].square().sum()


def separated(z):
    return torch.cat([z[:, :3].log_softmax(1), z[:, 3:5].log_softmax(1), z[:, 5:]], 1)


def by_three(z):
    return z.view(-1, 3, 2)


def smoothed(f, labels):
    return 0.9 * F.nll_loss(f, labels) - 0.1 * f.mean(1).mean()


# Each way: what follows the last layer, and the loss; the number of outputs; the loss of logits.
WAYS = {
    "classes": (3, F.cross_entropy, nn.LogSoftmax(1), F.nll_loss, LABELS),
    "sum": (
        3,
        lambda f, y: F.cross_entropy(f, y, reduction="sum"),
        nn.LogSoftmax(1),
        lambda f, y: F.nll_loss(f, y, reduction="sum"),
        LABELS,
    ),
    "class weights": (
        3,
        lambda f, y: F.cross_entropy(f, y, weight=WEIGHTS),
        nn.LogSoftmax(1),
        lambda f, y: F.nll_loss(f, y, weight=WEIGHTS),
        LABELS,
    ),
    "ignored inputs": (3, F.cross_entropy, nn.LogSoftmax(1), F.nll_loss, IGNORED),
    "label smoothing": (3, lambda f, y: F.cross_entropy(f, y, label_smoothing=0.1), nn.LogSoftmax(1), smoothed, LABELS),
    "soft labels": (
        3,
        lambda f, y: F.cross_entropy(f, y, reduction="sum"),
        nn.LogSoftmax(1),
        lambda f, y: F.kl_div(f, y, reduction="sum"),
        SOFT,
    ),
    "logarithms of a softmax": (3, F.cross_entropy, Link(lambda z: z.softmax(1).log()), F.nll_loss, LABELS),
    "probabilities": (3, F.cross_entropy, nn.Softmax(1), lambda f, y: F.nll_loss(f.log(), y), LABELS),
    "positions": (
        6,
        lambda f, y: F.cross_entropy(by_three(f), y),
        Link(lambda z: by_three(z).log_softmax(1)),
        F.nll_loss,
        POSITIONS,
    ),
    "positions first": (
        6,
        lambda f, y: F.cross_entropy(f.view(-1, 3), y.flatten()),
        Link(lambda z: z.view(-1, 2, 3).log_softmax(-1)),
        lambda f, y: F.nll_loss(f.view(-1, 3), y.flatten()),
        POSITIONS,
    ),
    "two heads": (
        6,
        lambda f, _: heads(f, F.cross_entropy),
        Link(separated),
        lambda f, _: heads(f, F.nll_loss),
        LABELS,
    ),
    "many labels": (6, F.binary_cross_entropy_with_logits, nn.Sigmoid(), F.binary_cross_entropy, MANY),
    "many labels by hand": (
        6,
        F.binary_cross_entropy_with_logits,
        nn.Sigmoid(),
        lambda f, y: -(y * f.log() + (1 - y) * (1 - f).log()).mean(),
        MANY,
    ),
}


COUNTS = ["hessian_nullity", "hessian_nullity_lower", "hessian_nullity_upper", "hessian_nullity_strict"]


COUNTS += ["hessian_negative", "gauss_newton_nullity", "hessian_certified", "hessian_method"]


def network(num_outputs, scale=1.0):
    body = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, num_outputs)))
    with torch.no_grad():
        body[2].weight.mul_(scale)
        body[2].bias.mul_(scale)
    return body


@pytest.mark.parametrize(("mode", "budget"), [("dense", None), ("bracket", 2_000_000), ("gauss-newton", None)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_one_loss_has_one_hessian_however_it_is_written(way, mode, budget):
    num_outputs, loss_of_logits, link, loss_fn, targets = WAYS[way]
    body, inputs = network(num_outputs), drawn(6, 3, seed=2)
    options = {"hessian": mode, "memory_budget": budget}
    expected = measure_basin(body, inputs, targets, loss_fn=loss_of_logits, **options)
    found = measure_basin(nn.Sequential(body, link), inputs, targets, loss_fn=loss_fn, **options)
    assert [getattr(found, name) for name in COUNTS] == [getattr(expected, name) for name in COUNTS]
    if mode == "dense":
        assert found.hessian_largest == pytest.approx(expected.hessian_largest, rel=1e-9)
        assert found.residual_curvature == pytest.approx(expected.residual_curvature, rel=1e-9)
    for (_, part), (_, other) in zip(found.layers.items(), expected.layers.items(), strict=True):
        assert part.gauss_newton_nullity == other.gauss_newton_nullity


@pytest.mark.parametrize("scale", [30.0, 300.0])
@pytest.mark.parametrize(
    "way", ["classes", "class weights", "ignored inputs", "label smoothing", "positions", "two heads"]
)
def test_saturation_does_not_tell_ways_to_write_a_loss_apart(way, scale):
    num_outputs, loss_of_logits, link, loss_fn, targets = WAYS[way]
    body, inputs = network(num_outputs, scale), drawn(6, 3, seed=2)
    expected = measure_basin(body, inputs, targets, loss_fn=loss_of_logits, hessian="dense")
    found = measure_basin(nn.Sequential(body, link), inputs, targets, loss_fn=loss_fn, hessian="dense")
    assert [getattr(found, name) for name in COUNTS] == [getattr(expected, name) for name in COUNTS]
    assert found.hessian_largest == pytest.approx(expected.hessian_largest, rel=1e-9)


@pytest.mark.parametrize("lead", [2.0, 40.0, 300.0, 700.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_derivatives_of_a_binary_cross_entropy_have_all_digits(lead, label, weight):
    outputs = torch.tensor([[lead], [-lead]], dtype=torch.float64)
    labels, weights = torch.full((2, 1), label, dtype=torch.float64), torch.tensor([weight], dtype=torch.float64)

    def loss_fn(f):
        return F.binary_cross_entropy_with_logits(f, labels, pos_weight=weights, reduction="sum")

    found = canonical_loss(loss_fn, outputs, list).curvature
    scale = weight if label else 1.0
    with mpmath.workdps(400):
        p = [1 / (1 + mpmath.exp(-z)) for z in (lead, -mpmath.mpf(lead))]
        slopes = torch.tensor([[float(scale * (q - label))] for q in p], dtype=torch.float64)
        curvatures = torch.tensor([[[float(scale * q * (1 - q))]] for q in p], dtype=torch.float64)
    torch.testing.assert_close(found.slope, slopes, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.matrices, curvatures, rtol=1e-13, atol=0)
    assert found.rounding == 0.0


@pytest.mark.parametrize("scale", [1.0, 60.0, 120.0])
def test_a_saturated_binary_classifier_is_the_softmax_of_its_logit_and_zero(scale):
    body = network(1, scale)
    inputs = drawn(200, 3, seed=6)
    inputs = inputs[body(inputs).squeeze(1).argsort(descending=True)[:8]].detach()
    labels = (body(inputs) > 0).double()
    pair = nn.Sequential(body, Link(lambda z: torch.cat([torch.zeros_like(z), z], 1)))
    for mode in ("dense", "bracket"):
        found = measure_basin(body, inputs, labels, loss_fn=nn.BCEWithLogitsLoss(), hessian=mode)
        classes = labels.long().squeeze(1)
        expected = measure_basin(pair, inputs, classes, loss_fn=nn.CrossEntropyLoss(), hessian=mode)
        assert [getattr(found, name) for name in COUNTS] == [getattr(expected, name) for name in COUNTS]
        assert found.hessian_largest == pytest.approx(expected.hessian_largest, rel=1e-2)
        assert found.gauss_newton_nullity == found.gradient_nullity


class LogSigmoid(nn.Module):
    def forward(self, z):
        return F.logsigmoid(z)


@pytest.mark.parametrize("mode", ["dense", "bracket"])
@pytest.mark.parametrize(
    ("link", "loss_fn"),
    [
        (LogSigmoid(), lambda f, _: -f.sum()),
        (nn.Identity(), lambda f, y: (f - y).abs().sum()),
        (nn.Identity(), lambda f, y: (f * y).sum()),
    ],
    ids=["logarithms of single probabilities", "absolute errors", "linear"],
)
def test_nothing_is_certified_where_all_of_the_hessian_is_residual(link, loss_fn, mode):
    record = measure_basin(
        nn.Sequential(network(3), link), drawn(6, 3, seed=2), drawn(6, 3, seed=5), loss_fn=loss_fn, hessian=mode
    )
    known = (record.hessian_nullity, record.hessian_nullity_lower, record.hessian_nullity_upper)
    assert (*known, record.hessian_certified) == (None, None, None, None)
    assert record.gauss_newton_nullity == record.num_parameters


def test_log_probabilities_at_these_weights_only_are_none():
    # The sum of the shares is one now, and the loss linear; at other weights it is not.
    body = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        body.weight.copy_(torch.tensor([[0.25], [0.75]]).log())
    inputs = torch.ones(2, 1, dtype=torch.float64)
    record = measure_basin(body, inputs, torch.tensor([0, 1]), loss_fn=nn.NLLLoss(), hessian="dense")
    # Linear in the weights: no curvature at all.
    assert record.hessian_nullity_strict == record.num_parameters == record.gauss_newton_nullity


@pytest.mark.filterwarnings("ignore:the Hessian is left out")
@pytest.mark.parametrize(("way", "scale"), [("probabilities", 60.0), ("many labels by hand", 12.0)])
def test_probabilities_that_have_rounded_are_refused_with_the_remedy(way, scale):
    num_outputs, _, link, loss_fn, targets = WAYS[way]
    body, inputs = network(num_outputs, scale), drawn(6, 3, seed=2)
    probabilities = nn.Sequential(body, link)
    if way == "many labels by hand":
        targets = (body(inputs) > 0).double()
    record = measure_basin(probabilities, inputs, targets, loss_fn=loss_fn)
    assert record.hessian_method is None
    assert any("return the logits" in note for note in record.notes)


def scaled_margin(f, y):
    return F.binary_cross_entropy_with_logits(2 * f, y)


def test_a_loss_of_which_no_digit_is_left_has_no_hessian():
    body = network(1)
    with torch.no_grad():
        body[2].bias.fill_(60.0)
    inputs = drawn(4, 3, seed=2)
    record = measure_basin(body, inputs, torch.ones(4, 1, dtype=torch.float64), loss_fn=scaled_margin)
    assert (record.hessian_method, record.hessian_nullity, record.gauss_newton_nullity) == (None, None, None)
    assert any("neither pulls nor curves" in note for note in record.notes)


@pytest.mark.parametrize("seed", [84, 302, 353, 7_000_117])
def test_what_is_said_of_a_hard_network_holds_in_80_digits(seed):
    check_bracket(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20_000, 20_004))
def test_what_is_said_of_random_networks_holds_in_80_digits(seed):
    check_bracket(seed)


class Classifier(LightningModule):
    """Classes by their log-probabilities, as most tutorials have it."""

    def __init__(self, *, is_logarithmic):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.is_logarithmic = is_logarithmic
        self.loss_fn = nn.NLLLoss() if is_logarithmic else nn.CrossEntropyLoss()

    def forward(self, x):
        return self.body(x).log_softmax(1) if self.is_logarithmic else self.body(x)

    def training_step(self, batch, _):
        return self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.fits
def test_a_run_on_log_probabilities_shows_the_nullities_of_one_on_logits(tmp_path):
    batches = DataLoader(TensorDataset(drawn(6, 3).float(), LABELS), 6)
    found = []
    for is_logarithmic in (True, False):
        with seeded():
            module = Classifier(is_logarithmic=is_logarithmic)
        monitor = BasinMonitor(probe=6)
        make_trainer(tmp_path, monitor).fit(module, batches)
        found.append([[getattr(record, name) for name in COUNTS] for record in monitor.records])
    assert found[0] == found[1]
    assert len(found[0]) > 1
    assert not any(record.hessian_certified for record in monitor.records)
