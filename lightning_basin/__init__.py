"""Ranks of behavioral gradients, null spaces of Hessians and duplicated activations, live in PyTorch Lightning."""

from lightning_basin.early_stopping import RankEarlyStopping
from lightning_basin.measurement import measure_basin
from lightning_basin.monitor import BasinMonitor
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord, LayerRecord

__all__ = ["BasinMonitor", "BasinRecord", "LayerRecord", "Probe", "RankEarlyStopping", "measure_basin"]
