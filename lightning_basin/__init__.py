"""Ranks of behavioral gradients, null spaces of Hessians and duplicated activations, live in PyTorch Lightning."""

from lightning_basin.callback.early_stopping import RankEarlyStopping
from lightning_basin.callback.monitor import BasinMonitor
from lightning_basin.measure import measure_basin
from lightning_basin.null_space import NullSpaceVerification, verify_null_space
from lightning_basin.offline import measure_checkpoints
from lightning_basin.pages.report import report
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord, LayerRecord, MergedInput
from lightning_basin.tangent_kernel import neural_tangent_kernel

__all__ = [
    "BasinMonitor",
    "BasinRecord",
    "LayerRecord",
    "MergedInput",
    "NullSpaceVerification",
    "Probe",
    "RankEarlyStopping",
    "measure_basin",
    "measure_checkpoints",
    "neural_tangent_kernel",
    "report",
    "verify_null_space",
]
