"""A copy of a module, run once on a probe and checked: what every quantity is measured on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.limits import GROUP_ELEMENTS
from lightning_basin.memory import MeasurementPlan
from lightning_basin.naming import escaped
from lightning_basin.network.input_layout import InputLayout, input_layout
from lightning_basin.network.isolation import at_rest, isolated_evaluation
from lightning_basin.network.network import LossFunction, Network
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.remedies import cause
from lightning_basin.network.replica import device_of, replicas, settle_embeddings
from lightning_basin.network.runs import TracedProbe, passed_otherwise
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
from lightning_basin.tensors import tensors_of

_FEW = 2  # inputs that are run at once, where not all are; some modules cannot run a batch of one

Planner = Callable[[Network, Probe, Trace], MeasurementPlan]
"""From a network, some inputs and their trace to how all inputs are measured."""


def _raised(loss_fn: LossFunction | None, dtype: torch.dtype) -> LossFunction | None:
    """A loss of the user in the precision of the evaluation; the behavioral one has it by itself."""
    if loss_fn is None or loss_fn is behavioral_loss:
        return loss_fn

    def raised(outputs: Tensor, targets: Any) -> Tensor:
        with RaisedPrecision(dtype):
            return loss_fn(outputs, targets)

    return raised


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A network on a probe, evaluated once. Nothing is checked after this.

    Attributes:
        settings: What is asked for.
        traced: The network's runs over the probe.
        loss_fn: The loss, copied along with the network; ``None`` where there is none.
        loss: The loss on the probe, shape ``()``.
        layout: Which part of what enters and leaves each layer belongs to which input.
        plan: How the measurement is cut to the memory that there is; ``None`` runs all inputs at once.
        notes: What a reader of the record should know; quantities add to it.
        unseen: The names of layers that training trains and on which the outputs do not depend.
    """

    settings: Settings
    traced: TracedProbe
    loss_fn: LossFunction | None
    loss: Tensor | None
    layout: InputLayout | None
    plan: MeasurementPlan | None
    notes: list[str]
    unseen: tuple[str, ...] = ()

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
    settings: Settings,
    make_plan: Planner | None = None,
    *,
    gradient_dtype: torch.dtype = torch.float64,
    with_layout: bool = False,
) -> Iterator[Evaluation]:
    """Evaluate a copy of a module once and check what comes out.

    Args:
        module: The module, which stays as it is.
        probe: The inputs and targets.
        settings: What is asked for.
        make_plan: Cuts the measurement to the memory that there is; ``None`` runs all inputs at once.
        gradient_dtype: The floating point type in which gradients are kept and multiplied.
        with_layout: Whether to find the inputs in what enters and leaves each layer.

    Yields:
        The evaluation, inside of which random states and global settings may change: all are put back.

    Raises:
        TypeError: If outputs or loss are not floating point tensors.
        ValueError: If outputs or loss are not finite, or not functions of the inputs alone.
    """
    if any(tensor.is_meta for tensor in tensors_of(probe.inputs)):
        raise ValueError("inputs must hold numbers to be measured, got tensors on the device 'meta'")
    empty = [escaped(name) for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(f"parameters must hold numbers, but {empty} are on the device 'meta': load them first")
    device, dtype = device_of(module), settings.torch_dtype
    with isolated_evaluation(device, dtype), at_rest(module):
        probe = probe.to(device, dtype)
        try:
            network, few, loss_fn, found = _evaluable(module, settings, probe, gradient_dtype)
        except ValueError as error:
            if dtype == torch.float64 and isinstance(error.__cause__, Exception):
                _check_what_helps(module, settings, probe, error)
            raise
        plan = None if make_plan is None else make_plan(network, *few)
        del few  # And its graph.
        traced = TracedProbe(network, probe, chunk_size=None if plan is None else plan.chunk_size)
        trace = traced.whole
        check_outputs(network, probe, trace)
        layout = _checked_layout(network, probe, trace, is_wanted=with_layout)
        check_copy(module, network.module, trace.outputs, "behavior")
        loss = None
        if loss_fn is not None:
            # Without a graph of all inputs, whether the loss depends on the outputs must still be seen.
            outputs = trace.outputs if traced.is_whole else trace.outputs.detach().requires_grad_()
            loss = checked_loss(loss_fn, outputs, probe.targets)
            check_copy(module, network.module, loss, "loss_fn")
        notes = [] if found.note is None else [found.note]
        yield Evaluation(settings, traced, loss_fn, loss, layout, plan, notes, found.unseen)


def _evaluable(
    module: nn.Module, settings: Settings, probe: Probe, gradient_dtype: torch.dtype
) -> tuple[Network, tuple[Probe, Trace], LossFunction | None, AsTrained]:
    """A copy that evaluates with the gradients of training, run on few inputs; the loss; what was found of them."""
    dtype = settings.torch_dtype
    replica, loss_fn, behavior = replicas(module, settings.loss, settings.outputs, dtype=dtype)
    network = Network(replica, behavior, dtype=dtype, gradient_dtype=gradient_dtype)
    settle_embeddings(replica, lambda: network.outputs(probe))
    few = _few_traced(network, probe)
    check_copy(module, replica, few[1].outputs, "behavior")
    found = as_trained(
        module, settings.loss, settings.outputs, network, probe, few[1].outputs, trained=settings.trained
    )
    if found.network is not None:
        network, loss_fn = found.network, found.loss_fn
        settle_embeddings(network.module, lambda: network.outputs(probe))
        few = _few_traced(network, probe)
    return network, few, _raised(loss_fn, dtype), found


def _check_what_helps(module: nn.Module, settings: Settings, probe: Probe, refused: ValueError) -> None:
    """Where a module cannot be called, try what is most often meant, and say so where it works.

    Raises:
        ValueError: With what helps; or with what float32 is refused for, where float64 is refused for something else.
    """
    others = {}
    if tensors_of(probe.targets):
        others["the module runs on the targets: pass these as inputs, and the inputs as targets"] = probe.targets
    if isinstance(probe.inputs, tuple | list) and len(probe.inputs) == 2:  # noqa: PLR2004
        others["it runs on the first of the pair that inputs is: pass inputs and targets apart"] = probe.inputs[0]
    for text, inputs in others.items():
        if _failure(module, settings, inputs, "float64") is None:
            raise ValueError(f"{_call_failed(refused)}; {text}") from refused.__cause__
    failure = _failure(module, settings, probe.inputs, "float32")
    if failure is None:
        text = "an operation that knows float32 only is measured with dtype='float32'"
        raise ValueError(f"{_call_failed(refused)}; {text}") from refused.__cause__
    if failure.__cause__ is None:  # It runs in float32, and is refused for something else.
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


def _few_traced(network: Network, probe: Probe) -> tuple[Probe, Trace]:
    """The first inputs, whose run shows how large that of all will be."""
    few = probe.select(range(min(_FEW, probe.size)))
    try:
        return few, network.trace(few)
    except (TypeError, ValueError):  # Some modules cannot run so few.
        return probe, network.trace(probe)


def _checked_layout(network: Network, probe: Probe, trace: Trace, *, is_wanted: bool) -> InputLayout | None:
    """Where the inputs are in what was traced, seen from other batches; these must have the same outputs."""
    others = passed_otherwise(network, probe, with_layers=is_wanted)
    check_independence(network, probe, trace.outputs.detach(), others)
    return input_layout(network, probe, trace, others) if is_wanted else None
