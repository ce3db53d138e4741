"""A copy of a module, run once on a probe and checked: every quantity is measured on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.limits import GROUP_ELEMENTS
from lightning_basin.memory import MeasurementPlan
from lightning_basin.naming import escaped
from lightning_basin.network.calls import LossFunction
from lightning_basin.network.input_layout import InputLayout
from lightning_basin.network.isolation import at_rest, isolated_evaluation
from lightning_basin.network.network import Network
from lightning_basin.network.remedies import cause
from lightning_basin.network.replica import device_of
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.network.trace import Trace
from lightning_basin.network.validity import check_copy, checked_loss
from lightning_basin.probe import Probe
from lightning_basin.settings import Precision, Settings
from lightning_basin.stages import StageClock
from lightning_basin.structure import Planner, StructureCache, copy_again, copy_and_find, question_of
from lightning_basin.tensors import tensors_of


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A network on a probe, evaluated once. Nothing is checked after this.

    Attributes:
        loss_fn: The loss function, copied along with the network; ``None`` where there is none.
        loss: The loss on the probe, shape ``()``.
        layout: Which rows of what enters and leaves each layer belong to which input; ``None`` if not asked for.
        plan: How the measurement is cut to the memory that is free; ``None`` runs all inputs at once.
        notes: What a reader of the record should know; quantities add to it.
        clock: The clock of the stages, which is in ``"trace"`` outside of all others.
        unseen: The names of layers that training trains, and on which the outputs do not depend.
        passed_checks: The names of checks that hold for the structure of the module, as in `Structure`.
    """

    settings: Settings
    runs: ProbeRuns
    loss_fn: LossFunction | None
    loss: Tensor | None
    layout: InputLayout | None
    plan: MeasurementPlan | None
    notes: list[str]
    clock: StageClock
    unseen: tuple[str, ...] = ()
    passed_checks: set[str] = field(default_factory=set)

    @property
    def network(self) -> Network:
        """The copy of the module, as a network."""
        return self.runs.network

    @property
    def probe(self) -> Probe:
        """The inputs."""
        return self.runs.probe

    @property
    def trace(self) -> Trace:
        """The trace of all inputs."""
        return self.runs.full_trace

    @property
    def max_elements(self) -> int:
        """The largest number of elements in the gradients of one layer, or in their factors."""
        return GROUP_ELEMENTS if self.plan is None else self.plan.layer_elements

    @property
    def num_outputs(self) -> int:
        """The number of outputs per input, c."""
        return self.rows.shape[1]

    @property
    def num_rows(self) -> int:
        """The number of outputs on all inputs, m."""
        return self.rows.numel()

    @property
    def rows(self) -> Tensor:
        """The outputs whose gradients count, shape ``(k, c)``."""
        return self.network.rows(self.trace.outputs)


@contextmanager
def open_evaluation(
    module: nn.Module,
    probe: Probe,
    settings: Settings,
    make_plan: Planner | None = None,
    *,
    with_layout: bool = False,
    cache: StructureCache | None = None,
    clock: StageClock | None = None,
) -> Iterator[Evaluation]:
    """Evaluate a copy of a module once and check the results.

    Random states and global settings that change inside of the context are put back. ``make_plan`` cuts the measurement
    to the memory that is free; ``None`` runs all inputs at once. ``cache`` has the structure that an evaluation of this
    kind has found before, which two calls of the module check. Outputs or loss that are not floating point tensors
    raise a TypeError; those that are not finite, or no functions of the inputs alone, a ValueError.
    """
    _check_numbers(module, probe)
    device, dtype = device_of(module, settings.torch_dtype), settings.torch_dtype
    clock = clock or StageClock()
    with isolated_evaluation(device, dtype), at_rest(module):
        probe = probe.to(device, dtype)
        question = None if cache is None else question_of(module, probe, settings)
        structure = None if cache is None else cache.find(question)
        copied = None if structure is None else copy_again(module, probe, settings, structure, clock)
        if copied is None:
            try:
                copied = copy_and_find(module, probe, settings, make_plan, clock, with_layout=with_layout)
            except ValueError as error:
                if dtype == torch.float64 and isinstance(error.__cause__, Exception):
                    _check_what_helps(module, settings, probe, error)
                raise
        runs, loss_fn, found = copied
        check_copy(module, runs.network.module, runs.full_trace.outputs, "behavior")
        loss = None
        if loss_fn is not None:
            # Without a graph of all inputs, too, a loss that does not depend on the outputs must be refused.
            outputs = runs.full_trace.outputs if runs.is_whole else runs.full_trace.outputs.detach().requires_grad_()
            loss = checked_loss(loss_fn, outputs, probe.targets, is_known=found is structure)
            check_copy(module, runs.network.module, loss, "loss_fn")
        if cache is not None:
            cache.keep(question, found)
        notes = [] if found.note is None else [found.note]
        yield Evaluation(
            settings=settings,
            runs=runs,
            loss_fn=loss_fn,
            loss=loss,
            layout=found.layout,
            plan=found.plan,
            notes=notes,
            clock=clock,
            unseen=found.unseen,
            passed_checks=found.passed_checks,
        )


def _check_numbers(module: nn.Module, probe: Probe) -> None:
    """Refuse tensors that have shapes only."""
    if any(tensor.is_meta for tensor in tensors_of(probe.inputs)):
        raise ValueError("inputs must hold numbers to be measured, got tensors on the device 'meta'")
    without_numbers = [escaped(name) for name, parameter in module.named_parameters() if parameter.is_meta]
    if without_numbers:
        raise ValueError(
            f"parameters must hold numbers, but {without_numbers} are on the device 'meta': load them first"
        )


def _check_what_helps(module: nn.Module, settings: Settings, probe: Probe, refused: ValueError) -> None:
    """Where a module cannot be called, try what is most often meant instead, and say what to pass if it works."""
    attempts: list[tuple[str, Any, Precision]] = []
    if tensors_of(probe.targets):
        text = "the module runs on the targets: pass these as inputs, and the inputs as targets"
        attempts.append((text, probe.targets, "float64"))
    if isinstance(probe.inputs, tuple | list) and len(probe.inputs) == 2:  # noqa: PLR2004
        text = "it runs on the first of the pair that inputs is: pass inputs and targets apart"
        attempts.append((text, probe.inputs[0], "float64"))
    text = "an operation that knows float32 only is measured with dtype='float32'"
    attempts.append((text, probe.inputs, "float32"))
    failure: Exception | None = None
    for text, inputs, dtype in attempts:
        failure = _failure(module, settings, inputs, dtype)
        if failure is None:
            assert isinstance(refused.__cause__, Exception)
            reason = f"calling the module on the inputs failed with {cause(refused.__cause__)}"
            raise ValueError(f"{reason}; {text}") from refused.__cause__
    if failure is not None and failure.__cause__ is None:  # It runs in float32, and is refused for another reason.
        raise ValueError(f"neither float64 nor float32 runs {type(module).__name__}: {failure}") from refused


def _failure(module: nn.Module, settings: Settings, inputs: Any, dtype: Precision) -> Exception | None:
    try:
        with open_evaluation(module, Probe(inputs), Settings(behavior=settings.behavior, hessian=False, dtype=dtype)):
            return None
    except (TypeError, ValueError) as error:
        return error
