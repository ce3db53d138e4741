"""A copy of a module, run once on a probe and checked: what every quantity is measured on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_basin.limits import GROUP_ELEMENTS
from lightning_basin.memory import MeasurementPlan
from lightning_basin.network.input_layout import InputLayout, input_layout
from lightning_basin.network.isolation import at_rest, isolated_evaluation
from lightning_basin.network.network import LossFunction, ModuleBehavior, Network
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.remedies import needs_float32
from lightning_basin.network.replica import device_of, replicas, settle_embeddings
from lightning_basin.network.runs import TracedProbe, passed_otherwise
from lightning_basin.network.trace import Trace
from lightning_basin.network.training_mode import as_trained
from lightning_basin.network.validity import (
    check_copy,
    check_float32_helps,
    check_independence,
    check_outputs,
    checked_loss,
)
from lightning_basin.probe import Probe
from lightning_basin.settings import Behavior, Probabilities
from lightning_basin.tensors import tensors_of

_FEW = 2  # inputs that are run at once, where not all are; some modules cannot run a batch of one

Planner = Callable[[Network, Probe, Trace], MeasurementPlan]
"""From a network, some inputs and their trace to how all inputs are measured."""


def loss_function(loss_fn: LossFunction | Literal["behavioral"] | None) -> LossFunction | None:
    """Return the loss as a function of outputs and targets; ``"behavioral"`` names one."""
    return behavioral_loss if isinstance(loss_fn, str) else loss_fn


def behavioral_loss(outputs: Tensor, _: Any) -> Tensor:
    """Squared distance from the outputs as they are (Bushnaq et al., 2024): zero, with the Hessian 2 GᵀG."""
    return squared_distance(outputs, outputs.detach())


def squared_distance(outputs: Tensor, others: Tensor) -> Tensor:
    """Return the sum of squared differences, shape ``()``."""
    return (outputs - others).square().sum()


def _raised(loss_fn: LossFunction | None, dtype: torch.dtype) -> LossFunction | None:
    """A loss of the user in the precision of the evaluation; the behavioral one has it by itself."""
    if loss_fn is None or loss_fn is behavioral_loss:
        return loss_fn

    def raised(outputs: Tensor, targets: Any) -> Tensor:
        with RaisedPrecision(dtype):
            return loss_fn(outputs, targets)

    return raised


def outputs_of(behavior: Behavior | None) -> ModuleBehavior | None:
    """What gives the module's outputs, which the loss takes; ``None`` calls the module."""
    if isinstance(behavior, Probabilities):
        return behavior.outputs
    return None if isinstance(behavior, str) else behavior


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A network on a probe, evaluated once."""

    traced: TracedProbe
    loss_fn: LossFunction | None
    loss: Tensor | None
    layout: InputLayout | None
    plan: MeasurementPlan | None = None
    notes: tuple[str, ...] = ()

    @property
    def network(self) -> Network:
        """The network, a copy."""
        return self.traced.network

    @property
    def probe(self) -> Probe:
        """The inputs."""
        return self.traced.probe

    @property
    def trace(self) -> Trace:
        """What one forward pass showed."""
        return self.traced.whole

    @property
    def max_elements(self) -> int:
        """Elements that the gradients of one layer, or their factors, may have."""
        return GROUP_ELEMENTS if self.plan is None else self.plan.layer_elements

    @property
    def num_outputs(self) -> int:
        """Outputs per input, c."""
        return self.rows.shape[1]

    @property
    def num_rows(self) -> int:
        """Outputs on all inputs, m."""
        return self.rows.numel()

    @property
    def rows(self) -> Tensor:
        """Outputs whose gradients count, shape ``(k, c)``."""
        return self.network.rows(self.trace.outputs)


@contextmanager
def open_evaluation(
    module: nn.Module,
    probe: Probe,
    loss_fn: LossFunction | None,
    behavior: ModuleBehavior | None,
    planned: Planner | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    gradient_dtype: torch.dtype = torch.float64,
    with_layout: bool = False,
) -> Iterator[Evaluation]:
    """Evaluate a copy of a module once and check what comes out.

    Args:
        module: Stays as it is.
        probe: The inputs.
        loss_fn: See `measure_basin`.
        behavior: See `measure_basin`.
        planned: Cuts the measurement to the memory that there is; ``None`` runs all inputs at once.
        dtype: Of the copy.
        gradient_dtype: See `Network`.
        with_layout: Whether to find the inputs in what enters and leaves each layer.
    """
    if any(tensor.is_meta for tensor in tensors_of(probe.inputs)):
        raise ValueError("inputs must hold numbers to be measured, got tensors on the device 'meta'")
    device = device_of(module)
    with isolated_evaluation(device, dtype), at_rest(module):
        probe = probe.to(device, dtype)
        try:
            network, few, loss_fn, note = _evaluable(module, loss_fn, behavior, probe, dtype, gradient_dtype)
        except ValueError as error:
            if dtype == torch.float64 and needs_float32(error):
                check_float32_helps(module, behavior, probe, error)
            raise
        plan = None if planned is None else planned(network, *few)
        del few  # And its graph.
        traced = TracedProbe(network, probe, chunk_size=None if plan is None else plan.chunk_size)
        trace = traced.whole
        check_outputs(probe, trace.outputs)
        layout = checked_layout(network, probe, trace, is_wanted=with_layout)
        check_copy(module, trace.outputs, "behavior")
        loss = None
        if loss_fn is not None:
            # Without a graph of all inputs, whether the loss depends on the outputs must still be seen.
            outputs = trace.outputs if traced.is_whole else trace.outputs.detach().requires_grad_()
            loss = checked_loss(loss_fn, outputs, probe.targets)
            check_copy(module, loss, "loss_fn")
        yield Evaluation(traced, loss_fn, loss, layout, plan, () if note is None else (note,))


def _evaluable(
    module: nn.Module,
    loss_fn: LossFunction | None,
    behavior: ModuleBehavior | None,
    probe: Probe,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
) -> tuple[Network, tuple[Probe, Trace], LossFunction | None, str | None]:
    """A copy that evaluates with the gradients of training, run on few inputs; the loss; a note where it needs one."""
    replica, copied_loss, copied_behavior = replicas(module, loss_fn, behavior, dtype=dtype)
    network = Network(replica, copied_behavior, dtype=dtype, gradient_dtype=gradient_dtype)
    settle_embeddings(replica, lambda: network.outputs(probe))
    few = _few_traced(network, probe)
    check_copy(module, few[1].outputs, "behavior")
    trained = as_trained(module, loss_fn, behavior, network, probe, few[1].outputs)
    if trained is None:
        return network, few, _raised(copied_loss, dtype), None
    network = Network(trained.module, trained.behavior, dtype=dtype, gradient_dtype=gradient_dtype)
    settle_embeddings(trained.module, lambda: network.outputs(probe))
    return network, _few_traced(network, probe), _raised(trained.loss_fn, dtype), trained.note


def _few_traced(network: Network, probe: Probe) -> tuple[Probe, Trace]:
    """The first inputs, whose run shows how large that of all will be."""
    few = probe.select(range(min(_FEW, probe.size)))
    try:
        return few, network.trace(few)
    except (TypeError, ValueError):  # Some modules cannot run so few.
        return probe, network.trace(probe)


def checked_layout(network: Network, probe: Probe, trace: Trace, *, is_wanted: bool) -> InputLayout | None:
    """Where the inputs are in what was traced, seen from other batches; these must have the same outputs."""
    others = passed_otherwise(network, probe, with_layers=is_wanted)
    check_independence(network, probe, trace.outputs.detach(), others)
    return input_layout(network, probe, trace, others) if is_wanted else None
