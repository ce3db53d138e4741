"""A copy of a module, run once on a probe and checked: every quantity is measured on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.limits import GROUP_ELEMENTS
from lightning_basin.memory import MeasurementPlan
from lightning_basin.naming import escaped
from lightning_basin.network.calls import LossFunction
from lightning_basin.network.input_layout import InputLayout, input_layout
from lightning_basin.network.isolation import at_rest, isolated_evaluation
from lightning_basin.network.network import Network
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.remedies import cause
from lightning_basin.network.replica import device_of, replicas, settle_embeddings
from lightning_basin.network.runs import ProbeRuns, run_regrouped
from lightning_basin.network.trace import Trace
from lightning_basin.network.training_mode import AsTrained, as_trained
from lightning_basin.network.validity import (
    check_copy,
    check_independence,
    check_outputs,
    checked_loss,
)
from lightning_basin.probe import Probe
from lightning_basin.settings import Precision, Settings, behavioral_loss
from lightning_basin.stages import StageClock
from lightning_basin.tensors import tensors_of

_SAMPLE_SIZE = 2
"""Inputs that are run before all; some modules cannot run a single one."""

Planner = Callable[[Network, Probe, Trace], MeasurementPlan]
"""A function of a network, some inputs and their trace that plans how all inputs are measured."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A network on a probe, evaluated once. Nothing is checked after this.

    Attributes:
        settings: What is asked of the measurement.
        runs: The network's runs over the probe.
        loss_fn: The loss function, copied along with the network; ``None`` where there is none.
        loss: The loss on the probe, shape ``()``.
        layout: Which rows of what enters and leaves each layer belong to which input; ``None`` if not asked for.
        plan: How the measurement is cut to the memory that is free; ``None`` runs all inputs at once.
        notes: What a reader of the record should know; quantities add to it.
        clock: The clock of the stages, which is in ``"trace"`` outside of all others.
        unseen: The names of layers that training trains, and on which the outputs do not depend.
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
    gradient_dtype: torch.dtype = torch.float64,
    with_layout: bool = False,
    clock: StageClock | None = None,
) -> Iterator[Evaluation]:
    """Evaluate a copy of a module once and check the results.

    Args:
        module: The module, which stays as it is.
        probe: The inputs and targets.
        settings: What is asked of the measurement.
        make_plan: A function that cuts the measurement to the memory that is free; ``None`` runs all inputs at once.
        gradient_dtype: The floating point type in which gradients are kept and multiplied.
        with_layout: Whether to find the rows of each input in what enters and leaves each layer.
        clock: The clock of the stages; ``None`` starts one.

    Yields:
        The evaluation. Random states and global settings that change inside of the context are put back.

    Raises:
        TypeError: If outputs or loss are not floating point tensors.
        ValueError: If outputs or loss are not finite, or not functions of the inputs alone.
    """
    if any(tensor.is_meta for tensor in tensors_of(probe.inputs)):
        raise ValueError("inputs must hold numbers to be measured, got tensors on the device 'meta'")
    without_numbers = [escaped(name) for name, parameter in module.named_parameters() if parameter.is_meta]
    if without_numbers:
        raise ValueError(
            f"parameters must hold numbers, but {without_numbers} are on the device 'meta': load them first"
        )
    device, dtype = device_of(module), settings.torch_dtype
    clock = clock or StageClock()
    with isolated_evaluation(device, dtype), at_rest(module):
        probe = probe.to(device, dtype)
        try:
            network, loss_fn, sample, trained = _copy_as_trained(module, settings, probe, gradient_dtype, clock)
        except ValueError as error:
            if dtype == torch.float64 and isinstance(error.__cause__, Exception):
                _check_what_helps(module, settings, probe, error)
            raise
        plan = None if make_plan is None else make_plan(network, *sample)
        del sample  # And its graph.
        runs = ProbeRuns(network, probe, chunk_size=None if plan is None else plan.chunk_size)
        trace = runs.full_trace
        check_outputs(network, probe, trace)
        layout = _checked_layout(network, probe, trace, with_layers=with_layout)
        check_copy(module, network.module, trace.outputs, "behavior")
        loss = None
        if loss_fn is not None:
            # Without a graph of all inputs, too, a loss that does not depend on the outputs must be refused.
            outputs = trace.outputs if runs.is_whole else trace.outputs.detach().requires_grad_()
            loss = checked_loss(loss_fn, outputs, probe.targets)
            check_copy(module, network.module, loss, "loss_fn")
        notes = [] if trained.note is None else [trained.note]
        yield Evaluation(settings, runs, loss_fn, loss, layout, plan, notes, clock, trained.unseen)


def _copy_as_trained(
    module: nn.Module, settings: Settings, probe: Probe, gradient_dtype: torch.dtype, clock: StageClock
) -> tuple[Network, LossFunction | None, tuple[Probe, Trace], AsTrained]:
    """Copy a module and the loss, so that the outputs have the gradients of training.

    Returns:
        The network, the loss, some inputs with their trace, and what was found out about training.
    """
    dtype = settings.torch_dtype
    with clock("copy"):
        replica, loss_fn, behavior = replicas(module, settings.loss, settings.outputs, dtype=dtype)
    network = Network(replica, behavior, dtype=dtype, gradient_dtype=gradient_dtype)
    settle_embeddings(replica, lambda: network.outputs(probe))
    sample, trace = _trace_sample(network, probe)
    check_copy(module, replica, trace.outputs, "behavior")
    trained = as_trained(
        module, settings.loss, settings.outputs, network, probe, trace.outputs, trained=settings.trained
    )
    if trained.network is not None:
        network, loss_fn = trained.network, trained.loss_fn
        settle_embeddings(network.module, lambda: network.outputs(probe))
        sample, trace = _trace_sample(network, probe)
    return network, _in_precision(loss_fn, dtype), (sample, trace), trained


def _in_precision(loss_fn: LossFunction | None, dtype: torch.dtype) -> LossFunction | None:
    """Return a loss of the user in the precision of the evaluation; the behavioral loss has it by itself."""
    if loss_fn is None or loss_fn is behavioral_loss:
        return loss_fn

    def raised(outputs: Tensor, targets: Any) -> Tensor:
        with RaisedPrecision(dtype):
            return loss_fn(outputs, targets)

    return raised


def _check_what_helps(module: nn.Module, settings: Settings, probe: Probe, refused: ValueError) -> None:
    """Where a module cannot be called, try what is most often meant instead.

    Raises:
        ValueError: If one of the attempts works: its message says what to pass. If the module runs in float32, but is
            refused for another reason: its message says the reason.
    """
    attempts = {}
    if tensors_of(probe.targets):
        attempts["the module runs on the targets: pass these as inputs, and the inputs as targets"] = probe.targets
    if isinstance(probe.inputs, tuple | list) and len(probe.inputs) == 2:  # noqa: PLR2004
        attempts["it runs on the first of the pair that inputs is: pass inputs and targets apart"] = probe.inputs[0]
    for text, inputs in attempts.items():
        if _failure(module, settings, inputs, "float64") is None:
            raise ValueError(f"{_call_failed(refused)}; {text}") from refused.__cause__
    failure = _failure(module, settings, probe.inputs, "float32")
    if failure is None:
        text = "an operation that knows float32 only is measured with dtype='float32'"
        raise ValueError(f"{_call_failed(refused)}; {text}") from refused.__cause__
    if failure.__cause__ is None:  # It runs in float32, and is refused for another reason.
        raise ValueError(f"neither float64 nor float32 runs {type(module).__name__}: {failure}") from refused


def _call_failed(refused: ValueError) -> str:
    assert isinstance(refused.__cause__, Exception)
    return f"calling the module on the inputs failed with {cause(refused.__cause__)}"


def _failure(module: nn.Module, settings: Settings, inputs: Any, dtype: Precision) -> Exception | None:
    try:
        with open_evaluation(module, Probe(inputs), Settings(behavior=settings.behavior, hessian=False, dtype=dtype)):
            return None
    except (TypeError, ValueError) as error:
        return error


def _trace_sample(network: Network, probe: Probe) -> tuple[Probe, Trace]:
    """Run the first inputs, which shows how much memory a run of all inputs takes."""
    sample = probe.select(range(min(_SAMPLE_SIZE, probe.size)))
    try:
        return sample, network.trace(sample)
    except (TypeError, ValueError):  # Some modules cannot run so few inputs.
        return probe, network.trace(probe)


def _checked_layout(network: Network, probe: Probe, trace: Trace, *, with_layers: bool) -> InputLayout | None:
    """Run regrouped inputs, which must have the same outputs, and find each input's rows in what was runs."""
    regrouped = run_regrouped(network, probe, with_layers=with_layers)
    check_independence(network, probe, trace.outputs.detach(), regrouped)
    return input_layout(network, probe, trace, regrouped) if with_layers else None
