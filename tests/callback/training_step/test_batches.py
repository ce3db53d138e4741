"""Batches of any form, of one loader and of several, are read by the training step."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_basin import BasinMonitor
from lightning_basin.tensors import tensors_of
from tests.callback.training_step.steps import ITEMS, Base, CrossEntropy, fitted, integers, stacked
from tests.lightning_packages import MisconfigurationException
from tests.training import Unmeasurable, loader, make_trainer

pytestmark = pytest.mark.fits


@dataclass
class Pictures:
    image: Tensor
    label: Tensor


Named = namedtuple("Named", "image label")


class OfFields(Base):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.image.flatten(1)), batch.label)


class OfTriples(Base):
    def training_step(self, batch, batch_idx):
        image, label, weight = batch
        return (F.cross_entropy(self.net(image.flatten(1)), label, reduction="none") * weight).mean()


@pytest.mark.parametrize(
    ("kind", "collate_fn"),
    [
        (OfFields, lambda items: Pictures(*stacked(items))),
        (OfFields, lambda items: Named(*stacked(items))),
        (OfTriples, lambda items: (*stacked(items), torch.ones(len(items)))),
    ],
    ids=["dataclass", "named tuple", "triple"],
)
def test_batches_of_any_form_are_measured(tmp_path, kind, collate_fn):
    monitor, ordinary = BasinMonitor(20), BasinMonitor(20)
    fitted(tmp_path, kind(), monitor, collate_fn=collate_fn)
    fitted(tmp_path, CrossEntropy(), ordinary)
    assert [integers(record) for record in monitor.records] == [integers(record) for record in ordinary.records]


class TwoLoaders(Base):
    def training_step(self, batch, batch_idx):
        return sum(F.cross_entropy(self.net(image.flatten(1)), label) for image, label in batch)


def test_two_loaders_are_measured_together(tmp_path):
    monitor = BasinMonitor(8)
    loaders = [DataLoader(ITEMS, 8, collate_fn=stacked), DataLoader(ITEMS[::-1], 8, collate_fn=stacked)]
    make_trainer(tmp_path, monitor, max_epochs=1).fit(TwoLoaders(), loaders)
    # For each of 8 pairs of inputs the three outputs of both.
    assert monitor.records[0].num_rows == 8 * 6


class InlineOfTwoLoaders(Base):
    """Its loss cannot be read, and its forward would take a pair of batches."""

    def forward(self, first, second):
        return self.net(first.flatten(1))

    def training_step(self, batch, batch_idx):
        batches = batch.values() if isinstance(batch, dict) else batch
        penalty = sum(parameter.square().sum() for parameter in self.net.parameters())
        return penalty + sum((self.net(image.flatten(1)) - label[:, None]).square().mean() for image, label in batches)


@pytest.mark.parametrize("form", [list, dict])
def test_batches_of_two_loaders_are_no_pair(tmp_path, form):
    loaders = [DataLoader(ITEMS, 8, collate_fn=stacked), DataLoader(ITEMS, 8, collate_fn=stacked)]
    loaders = loaders if form is list else dict(zip("ab", loaders, strict=True))
    key = {list: "0", dict: "'a'"}[form]
    with pytest.raises(
        MisconfigurationException, match=rf"each of 2 loaders: pass batch_fn=lambda batch: batch\[{key}\]"
    ):
        make_trainer(tmp_path, BasinMonitor(8), max_epochs=1).fit(InlineOfTwoLoaders(), loaders)
    monitor = BasinMonitor(
        8, batch_fn=lambda batch: batch[0 if form is list else "a"], behavior=lambda m, x: m.net(x.flatten(1))
    )
    make_trainer(tmp_path, monitor, max_epochs=1).fit(InlineOfTwoLoaders(), loaders)
    assert monitor.records[0].num_rows == 8 * 3


SETS = {
    "pairs": ([(row, row[:2]) for row in torch.eye(8)[:, :3]], "batch[0]"),
    "dicts": ([{"x": row, "y": row[:2]} for row in torch.eye(8)[:, :3]], "(batch[0]['x'], batch[0]['y'])"),
    "inputs": (list(torch.eye(8)[:, :3]), "(batch[0], None)"),
}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("items", "pair"), SETS.values(), ids=SETS)
def test_what_is_proposed_for_several_loaders_helps(tmp_path, items, pair, number):
    class Sum(Unmeasurable):
        def training_step(self, batch, batch_idx):
            penalty = self.hidden.weight.square().sum()  # With which the step cannot be read.
            return penalty + sum(self(tensors_of(part)[0]).square().mean() for part in batch)

    loaders = [DataLoader(items, 8) for _ in range(number)]
    with pytest.raises(MisconfigurationException, match=f"each of {number} loaders: pass ") as refused:
        make_trainer(tmp_path, BasinMonitor(8), max_epochs=1).fit(Sum(), loaders)
    assert f"batch_fn=lambda batch: {pair} for those of the first" in str(refused.value)
    monitor = BasinMonitor(8, batch_fn=eval(f"lambda batch: {pair}"))
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Sum(), loaders)
    assert monitor.records[0].num_inputs == 8


def test_the_whole_training_set_is_read_in_the_form_of_the_step(tmp_path):
    class Items(Dataset):
        def __len__(self):
            return 37

        def __getitem__(self, index):
            return ITEMS[index % 32]

    items = Items()
    monitor = BasinMonitor(20, duplicates_over="train")
    fitted(tmp_path, CrossEntropy(), monitor, items=items)
    assert monitor.records[0].train_num_inputs == 37
    assert monitor.records[0].train_output_duplicated_activations == 5


def test_pairs_of_a_regression_are_measured_as_before(tmp_path):
    class LossInStep(Base):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), batch[1])

    monitor = BasinMonitor(20)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(LossInStep(), loader())
    record = monitor.records[0]
    assert (record.gradient_rank, record.hessian_nullity) == (8, record.num_parameters - 8)
