"""Fits of modules whose evaluation mode cuts gradients off."""

import copy

import pytest
import torch
from torch import nn

from lightning_basin import BasinMonitor, measure_basin
from tests.lightning_packages import Callback, MisconfigurationException
from tests.network.cut_modules import (
    CUT_BY_FORWARD,
    PAIRS,
    DetachedHead,
    FirstEnabledByTraining,
    Freezing,
    Inference,
    Inline,
    Lit,
    PartlyDetachedInEvaluation,
    PartWithoutGradient,
    Plain,
    StraightThroughInTraining,
    blocks,
    fitted,
    frozen,
    trained,
)
from tests.networks import drawn

pytestmark = pytest.mark.fits


@pytest.mark.parametrize("name", ["merged by eval", "enabled by training", "noise in training"])
def test_a_fit_with_a_monitor_trains_the_same_weights_and_measures_the_uncut_rank(tmp_path, name):
    build, build_plain = PAIRS[name]
    net = trained(build()).float()
    monitor = BasinMonitor(16)
    watched, plain = fitted(copy.deepcopy(net), tmp_path, monitor), fitted(copy.deepcopy(net), tmp_path)
    for key, tensor in watched.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key]), key
    assert len(monitor.records) == 3
    uncut = build_plain().train()
    uncut.load_state_dict(watched.net.state_dict())
    assert monitor.records[-1].gradient_rank == measure_basin(uncut, monitor.probe).gradient_rank > 4


def test_a_fit_whose_forward_takes_no_gradients_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(MisconfigurationException, match="runs under no_grad or inference_mode"):
        fitted(Inference(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), tmp_path, BasinMonitor(8))


class InlineThroughForward(Lit):
    def training_step(self, batch, _):
        return (self(batch[0]) - batch[1]).square().mean()


class InlineWithPenalty(Lit):
    """The first block is trained by a loss of its own."""

    def training_step(self, batch, _):
        return (self(batch[0]) - batch[1]).square().mean() + self.net.first(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("net", "kind", "behavior"),
    [
        *((net, kind, lambda module, inputs: module(inputs)) for net, kind in CUT_BY_FORWARD),
        (DetachedHead, InlineWithPenalty, None),
    ],
)
def test_a_fit_that_trains_a_part_which_forward_cuts_off_is_refused(tmp_path, net, kind, behavior):
    with pytest.raises(MisconfigurationException, match=r"reaches the parameters of the layers \['net.first'\], and"):
        fitted(net(*blocks()), tmp_path, BasinMonitor(8, behavior=behavior), kind=kind)


def test_a_fit_that_passes_its_forward_by_is_measured_in_training_mode(tmp_path):
    net, monitor = FirstEnabledByTraining(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), BasinMonitor(16)
    fitted(net, tmp_path, monitor, kind=Inline)
    assert [record.gradient_rank for record in monitor.records] == [26, 26, 26]


@pytest.mark.parametrize("kind", [Inline, InlineThroughForward])
@pytest.mark.parametrize("net", [Plain, PartWithoutGradient])
def test_a_frozen_part_costs_no_word(tmp_path, recwarn, caplog, net, kind):
    monitor = BasinMonitor(16)
    fitted(frozen(net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), tmp_path, monitor, kind=kind)
    assert [record.gradient_rank for record in monitor.records] == [10, 10, 10]
    assert "layers [" not in caplog.text + "".join(str(warning.message) for warning in recwarn)


def test_a_part_that_neither_training_nor_forward_gives_gradients_costs_no_word(tmp_path, recwarn, caplog):
    net, monitor = PartWithoutGradient(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), BasinMonitor(16)
    fitted(net, tmp_path, monitor, kind=InlineThroughForward)
    assert [record.gradient_rank for record in monitor.records] == [10, 10, 10]
    assert "layers [" not in caplog.text + "".join(str(warning.message) for warning in recwarn)


class Averaged(Plain):
    """Evaluation uses a frozen copy of the first block."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.average = copy.deepcopy(self.first).requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.rest((self.first if self.training else self.average)(x))


def test_layers_that_are_trained_and_that_evaluation_does_not_use_are_said_to_be_unseen(tmp_path):
    net, monitor = Averaged(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), BasinMonitor(16)
    with pytest.warns(UserWarning, match=r"do not depend on the layers \['net.first'\], which training trains"):
        fitted(net, tmp_path, monitor, kind=InlineThroughForward)
    assert [record.layers["net.first"].gradient_rank for record in monitor.records] == [0, 0, 0]


class Switch(Callback):
    """Does something to the net at the beginning of the second epoch."""

    def __init__(self, change):
        self.change = change

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.change(pl_module.net)


class InlineForAll(Inline):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_part_that_is_trained_from_some_epoch_on_is_not_measured_with_rank_zero(tmp_path):
    net, monitor = frozen(PartWithoutGradient(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), BasinMonitor(16)
    unfreeze = Switch(lambda net: net.first.requires_grad_(requires_grad=True))
    with pytest.warns(UserWarning, match=r"could not measure at step 6.*layers \['net.first'\]"):
        fitted(net, tmp_path, monitor, unfreeze, kind=InlineForAll)
    assert [(record.step, record.gradient_rank) for record in monitor.records] == [(0, 10), (3, 10)]


class FirstEnabledByFlag(Plain):
    is_enabled = True

    def forward(self, x):
        with torch.set_grad_enabled(self.is_enabled):
            h = self.first(x)
        return self.rest(h)


class ThroughForwardForAll(InlineThroughForward, InlineForAll):
    """All parameters are in the optimizer, whatever becomes of them."""


def test_a_part_that_is_no_longer_trained_from_some_epoch_on_has_rank_zero(tmp_path):
    net, monitor = FirstEnabledByFlag(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), BasinMonitor(16)
    disable = Switch(lambda net: setattr(net, "is_enabled", False))
    fitted(net, tmp_path, monitor, disable, kind=ThroughForwardForAll)
    assert [record.gradient_rank for record in monitor.records] == [26, 26, 10]


class Stream(Plain):
    """Draws from a generator of Python's, that no copy can have."""

    numbers = None

    def forward(self, x):
        if self.training:
            self.numbers = self.numbers or (generator for generator in map(float, range(100)))
            x = x + 0.01 * next(self.numbers)
        return super().forward(x)


@pytest.mark.parametrize("net", [PartlyDetachedInEvaluation, Freezing, StraightThroughInTraining, Stream])
@pytest.mark.parametrize("behavior", [None, lambda module, inputs: module(inputs)])
def test_training_is_the_same_with_a_monitor(tmp_path, net, behavior):
    net = trained(net(*blocks())).float()
    modes = [
        fitted(copy.deepcopy(net), tmp_path, *monitors, kind=InlineThroughForward)
        for monitors in ([], [BasinMonitor(16, behavior=behavior)])
    ]
    alone, watched = (
        [*module.state_dict().values(), *(torch.tensor(part.training) for part in module.modules())] for module in modes
    )
    assert all(map(torch.equal, alone, watched))


class ForPredictions(Plain):
    def train(self, mode=True):  # noqa: FBT002 - as its base has it
        if mode:
            raise NotImplementedError("this module is for predictions")
        return super().train(mode)


def test_a_module_that_cannot_be_trained_is_measured_as_it_is():
    inputs = drawn(9, 3)
    plain = Plain(*blocks()).double().eval()
    module = ForPredictions(plain.first, *plain.rest).double().eval()
    assert measure_basin(module, inputs).gradient_rank == measure_basin(plain, inputs).gradient_rank
