"""What a training step trains, in the words of a measurement: outputs, targets and a loss."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_basin.callback.step_loss import RunLoss, StepLoss
from lightning_basin.probe import Probe
from lightning_basin.tensors import tensors_of


@dataclass(frozen=True, eq=False)
class KnownStep:
    """A step of which three runs have shown that its loss is a function of its outputs.

    Attributes:
        calls: The positions, among all calls, of those that have the outputs.
        names: The names of the losses, or of the module that returned the outputs.
        operations: The operations of the step in their order.
    """

    calls: tuple[int, ...]
    names: tuple[str, ...]
    operations: list[Hashable]


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """What one run of a training step showed.

    Attributes:
        calls: The positions, among all calls, of those that have the outputs.
        probe: The whole batch as inputs, with the loss's targets.
        outputs: The outputs that the losses took, or a module returned, shape ``(k, ...)``, detached.
        loss: The loss of the outputs; ``None`` where it is no function of outputs and targets alone.
        value: The value of the loss that the step returned.
        names: The names of the losses, or of the module that returned the outputs.
        is_whole: Whether ``loss`` is all that the step returned.
        is_of_a_module: Whether a module returned the outputs; the loss then takes the whole batch as targets.
        reached: The names of the parameters that are in the graph of the outputs.
        operations: The operations of the step in their order; empty where they were not recorded.
    """

    calls: tuple[int, ...]
    probe: Probe
    outputs: Tensor
    loss: StepLoss | RunLoss | None
    value: float
    names: tuple[str, ...]
    is_whole: bool
    is_of_a_module: bool
    reached: frozenset[str]
    operations: list[Hashable]

    @property
    def known(self) -> KnownStep | None:
        """What a later reading may take over: that the loss is all that the step returns, and a function of outputs."""
        is_known = self.is_whole and self.loss is not None and self.operations
        return KnownStep(self.calls, self.names, self.operations) if is_known else None

    @property
    def targets(self) -> Any:
        """The targets for another loss: the second of a pair where no loss that was called says them."""
        targets = self.probe.targets
        if self.is_of_a_module:
            return targets[1] if isinstance(targets, tuple | list) and len(targets) == 2 else targets  # noqa: PLR2004
        return targets[0] if len(targets) == 1 else targets

    @property
    def loss_in_words(self) -> str:
        """What is known of the loss."""
        named = " + ".join(dict.fromkeys(self.names))
        if self.loss is None:
            return "no loss, as it is no function of outputs and targets that is the same in every batch"
        if self.is_of_a_module:
            return "loss: " + ("all" if self.is_whole else "some") + " of what the step makes of them"
        return (
            f"loss: all of what the step returns ({named})"
            if self.is_whole
            else f"loss: {named}, not all of what it returns"
        )

    def __str__(self) -> str:
        """One sentence."""
        outputs = str(tuple(self.outputs.shape))
        targets = ", ".join(str(tuple(target.shape)) for target in tensors_of(self.probe.targets)) or "none"
        if self.is_of_a_module:
            outputs, targets = f"{outputs} of {self.names[0]}", "the rest of the batch"
        return (
            f"BasinMonitor reads training_step: outputs {outputs}, targets {targets}, {self.loss_in_words}. "
            f"HINT: for something else pass behavior=, batch_fn= and loss_fn="
        )
