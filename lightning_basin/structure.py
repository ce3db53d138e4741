"""What one measurement finds out about the structure of a module, so that those after it need not.

Whether evaluation mode cuts gradients off, whether inputs influence each other, which rows of an activation belong to
which input, and what fits into memory: it takes several copies and forward passes to find out. A later measurement
takes it over where its forward pass runs the same operations on tensors of the same shapes, and half of the inputs,
run alone, have the same activations as among all.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.memory import MeasurementPlan, still_fits
from lightning_basin.network.calls import LossFunction
from lightning_basin.network.input_layout import InputLayout, input_layout, keeps_layout
from lightning_basin.network.modes import in_training_mode, names_in_training
from lightning_basin.network.network import Network
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.replica import device_of, replicas, settle_embeddings
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.network.runs import ProbeRuns, run_regrouped
from lightning_basin.network.trace import Trace
from lightning_basin.network.training_mode import AsTrained, as_trained
from lightning_basin.network.validity import check_copy, check_independence, check_outputs
from lightning_basin.probe import Probe
from lightning_basin.settings import Settings, behavioral_loss
from lightning_basin.stages import StageClock
from lightning_basin.tensors import tensors_of

_SAMPLE_SIZE = 2
"""Inputs that are run before all; some modules cannot run a single one."""

Planner = Callable[[Network, Probe, Trace], MeasurementPlan]
"""A function of a network, some inputs and their trace that plans how all inputs are measured."""


@dataclass(frozen=True, eq=False)
class Structure:
    """The structure of a module on a probe.

    Attributes:
        modes: The names of the modules that are in training mode; ``None`` for a copy in evaluation mode.
        note: The record's note on these modes, or on layers that are cut off; ``None`` for nothing.
        unseen: The names of layers that training trains, and on which the outputs do not depend.
        plan: The plan of the measurement; ``None`` where all inputs are run at once.
        layout: The rows of each input in what enters and leaves each layer; ``None`` if not asked for.
        is_settled: Whether the modes are the same at other weights.
        passed_checks: The names of further checks that hold at all weights, to which quantities add theirs.
        passed: The operations and shapes of the forward pass of all inputs, as `_forward_pass` returns them; empty
            where it is not known.
    """

    modes: tuple[str, ...] | None
    note: str | None
    unseen: tuple[str, ...]
    plan: MeasurementPlan | None
    layout: InputLayout | None
    is_settled: bool = True
    passed_checks: set[str] = field(default_factory=set)
    passed: list[Hashable] = field(default_factory=list)


Copied = tuple[ProbeRuns, LossFunction | None, Structure]
"""The runs of a copy of the module, the copy of the loss, and the structure."""


class StructureCache:
    """Keeps the structure that the last measurement of a run has found, for the next one.

    A structure that other weights may show to be another one is not kept.
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, Structure] | None = None

    def find(self, question: Hashable) -> Structure | None:
        """Return the structure that answers a question of `question_of`; ``None`` where it was not the last one."""
        return None if self._kept is None or self._kept[0] != question else self._kept[1]

    def keep(self, question: Hashable, structure: Structure) -> None:
        """Keep the structure that a measurement has found."""
        self._kept = (question, structure) if structure.is_settled and structure.passed else None


def question_of(module: nn.Module, probe: Probe, settings: Settings) -> Hashable:
    """Return what the structure depends on before a forward pass: parameters, inputs, and what is asked for."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    is_training = [submodule.training for submodule in module.modules()]
    return (
        type(module),
        tuple(is_training) if module.training and not all(is_training) else None,
        tuple((name, tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device) for name, tensor in tensors),
        tuple((tensor.shape, tensor.dtype) for tensor in tensors_of((probe.inputs, probe.targets))),
        settings.precision,
        settings.layers if isinstance(settings.layers, str) else tuple(settings.layers),
        settings.planned_hessian,
        settings.max_outputs,
        settings.memory_budget,
        settings.counts_probabilities,
        frozenset(settings.trained),
    )


def _forward_pass(trace: Trace) -> list[Hashable]:
    """List the operations and shapes of a forward pass, equal for the same computation; empty where not recorded."""

    def shapes(tensors: dict[str, list[torch.Tensor]]) -> Hashable:
        return tuple((name, *(tensor.shape for tensor in tensors[name])) for name in tensors)

    operations = trace.operations.sequence
    return [*operations, shapes(trace.entering), shapes(trace.leaving), trace.outputs.shape] if operations else []


def copy_and_find(
    module: nn.Module,
    probe: Probe,
    settings: Settings,
    make_plan: Planner | None,
    clock: StageClock,
    *,
    with_layout: bool,
) -> Copied:
    """Copy a module, run the copy, and find out and check its structure."""
    network, loss_fn, sample, trained = _copy_as_trained(module, settings, probe, clock)
    plan = None if make_plan is None else make_plan(network, *sample)
    del sample  # And its graph.
    runs = ProbeRuns(network, probe, chunk_size=None if plan is None else plan.chunk_size)
    trace = runs.full_trace
    check_outputs(network, probe, trace)
    # Regrouped inputs must have the same outputs, and show each input's rows in what was run.
    regrouped = run_regrouped(network, probe, with_layers=with_layout)
    check_independence(network, probe, trace.outputs.detach(), regrouped)
    layout = input_layout(network, probe, trace, regrouped) if with_layout else None
    modes = None if trained.network is None else names_in_training(network)
    structure = Structure(
        modes=modes,
        note=trained.note,
        unseen=trained.unseen,
        plan=plan,
        layout=layout,
        is_settled=trained.is_settled,
        passed=_forward_pass(trace),
    )
    return runs, loss_fn, structure


def copy_again(
    module: nn.Module, probe: Probe, settings: Settings, structure: Structure, clock: StageClock
) -> Copied | None:
    """Copy and run a module whose structure is known; return ``None`` where it is no longer that of the module."""
    with clock("copy"):
        network, loss_fn = _copy_in_modes(module, settings, structure.modes)
    plan = structure.plan
    if plan is not None and not still_fits(
        plan, network.module, device_of(network.module, network.dtype), settings.memory_budget
    ):
        return None
    runs = ProbeRuns(network, probe, chunk_size=None if plan is None else plan.chunk_size)
    try:
        settle_embeddings(network.module, lambda: network.outputs(probe))
        check_outputs(network, probe, runs.full_trace)
        if _forward_pass(runs.full_trace) != structure.passed or not _keeps_layout(runs, structure.layout):
            return None
    except (TypeError, ValueError):  # What is wrong is said where all is checked.
        return None
    return runs, _in_precision(loss_fn, settings.torch_dtype), structure


def _keeps_layout(runs: ProbeRuns, layout: InputLayout | None) -> bool:
    """Return whether half of the inputs have the results which they have among all: weights may have begun to mix."""
    network, probe = runs.network, runs.probe
    ((indices, half),) = run_regrouped(network, probe, with_layers=layout is not None, num_chunks=1)
    rtol = agreement_rtol(network.dtype)
    return keeps_layout(layout, runs.full_trace, indices, half, num_inputs=probe.size, rtol=rtol)


def _copy_in_modes(module: nn.Module, settings: Settings, modes: tuple[str, ...] | None) -> tuple[Network, Any]:
    """Copy a module and the loss: in evaluation mode, or with some modules in training mode."""
    dtype = settings.torch_dtype
    if modes is not None:
        return in_training_mode(module, settings.loss, settings.outputs, dtype=dtype, modes=modes)
    replica, loss_fn, behavior = replicas(module, settings.loss, settings.outputs, dtype=dtype)
    return Network(replica, behavior, dtype=dtype), loss_fn


def _copy_as_trained(
    module: nn.Module, settings: Settings, probe: Probe, clock: StageClock
) -> tuple[Network, LossFunction | None, tuple[Probe, Trace], AsTrained]:
    """Copy a module and the loss, so that the outputs have the gradients of training."""
    with clock("copy"):
        network, loss_fn = _copy_in_modes(module, settings, None)
    settle_embeddings(network.module, lambda: network.outputs(probe))
    sample, trace = _trace_sample(network, probe)
    check_copy(module, network.module, trace.outputs, "behavior")
    try:
        trained = as_trained(
            module, settings.loss, settings.outputs, network, probe, trace.outputs, trained=settings.trained
        )
    except ValueError:  # What compares inputs may find nothing to compare in a few: this looks like a cut.
        with torch.no_grad():
            regrouped = run_regrouped(network, probe, with_layers=False)
            check_independence(network, probe, network.outputs(probe), regrouped)
        raise
    if trained.network is not None:
        network, loss_fn = trained.network, trained.loss_fn
        settle_embeddings(network.module, lambda: network.outputs(probe))
        sample, trace = _trace_sample(network, probe)
    return network, _in_precision(loss_fn, settings.torch_dtype), (sample, trace), trained


def _in_precision(loss_fn: LossFunction | None, dtype: torch.dtype) -> LossFunction | None:
    """Return a loss of the user in the precision of the evaluation; the behavioral loss has it by itself."""
    if loss_fn is None or loss_fn is behavioral_loss:
        return loss_fn

    def raised(outputs: Tensor, targets: Any) -> Tensor:
        with RaisedPrecision(dtype):
            return loss_fn(outputs, targets)

    return raised


def _trace_sample(network: Network, probe: Probe) -> tuple[Probe, Trace]:
    """Run the first inputs, which shows how much memory a run of all inputs takes."""
    sample = probe.select(range(min(_SAMPLE_SIZE, probe.size)))
    try:
        return sample, network.trace(sample)
    except (TypeError, ValueError):  # Some modules cannot run so few inputs.
        return probe, network.trace(probe)
