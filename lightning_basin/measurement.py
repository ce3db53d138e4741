"""Names of earlier versions, for scripts that import them: use `lightning_basin.measure_basin`."""

from typing import Any

from torch import nn

from lightning_basin import measure
from lightning_basin.measure import measure_basin
from lightning_basin.memory import MeasurementPlan
from lightning_basin.probe import Probe
from lightning_basin.settings import Settings

__all__ = ["check_measurable", "measure_basin"]


def check_measurable(
    module: nn.Module, probe: Probe, *, num_inputs: int | None = None, is_loss_given: bool = True, **settings: Any
) -> MeasurementPlan:
    """Evaluate once, with the settings as keywords; see `lightning_basin.measure.check_measurable`."""
    return measure.check_measurable(
        module, probe, Settings(**settings), num_inputs=num_inputs, is_loss_given=is_loss_given
    )
