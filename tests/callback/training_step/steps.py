"""Modules and items for tests of training steps."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.lightning_packages import LightningModule
from tests.training import make_trainer, seeded

GENERATOR = torch.Generator().manual_seed(0)


IMAGES, LABELS = torch.randn(32, 2, 3, generator=GENERATOR), torch.randint(0, 3, (32,), generator=GENERATOR)


TARGETS, MASK = torch.randn(32, 3, generator=GENERATOR), torch.rand(32, 3, generator=GENERATOR) > 0.3


TOKENS = torch.randint(0, 5, (32, 4), generator=GENERATOR)


ITEMS = [
    {"image": image, "label": label, "target": target, "mask": mask, "tokens": tokens}
    for image, label, target, mask, tokens in zip(IMAGES, LABELS, TARGETS, MASK, TOKENS, strict=True)
]


class Base(LightningModule):
    """A small network over flat images; each subclass trains it in another way."""

    def __init__(self):
        super().__init__()
        with seeded():
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
            self.tokens = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Classifier(Base):
    """Reads the images and labels of a dict."""

    def logits(self, batch):
        return self.net(batch["image"].flatten(1))


def by_net(module, batch):
    return module.net(batch["image"].flatten(1))


class CrossEntropy(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch), batch["label"])


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = F.cross_entropy(self.logits(batch), batch["label"])
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        self.log("loss", loss)


def fitted(root, module, monitor=None, items=ITEMS, collate_fn=None, **options):
    callbacks = [] if monitor is None else [monitor]
    trainer = make_trainer(root, *callbacks, **{"max_epochs": 1} | options)
    with seeded(2):
        trainer.fit(module, DataLoader(items, 8, collate_fn=collate_fn))
    return trainer


def whole_probe(size=20):
    return {name: torch.stack([item[name] for item in ITEMS[:size]]) for name in ITEMS[0]}


def integers(record):
    layers = {
        name: (layer.gradient_rank, layer.duplicated_activations, layer.dead_units, layer.hessian_nullity_strict)
        for name, layer in record.layers.items()
    }
    network = (record.num_rows, record.gradient_rank, record.gradient_rank_bound, record.output_duplicated_activations)
    return (*network, record.hessian_nullity, record.hessian_nullity_lower, record.hessian_nullity_upper, layers)


def stacked(items):
    return [torch.stack([item[name] for item in items]) for name in ("image", "label")]
