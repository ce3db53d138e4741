"""Ranks of behavioral gradients, null spaces of Hessians and duplicated activations, live in PyTorch Lightning."""

from lightning_basin.measurement import measure_basin
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord, LayerRecord
