"""A module as a function from inputs to outputs, whose layers and operations can be looked at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from lightning_basin.network.calls import ModuleBehavior, call_behavior, call_module, checked_outputs
from lightning_basin.network.layers import Layer, find_layers
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.replica import replicas
from lightning_basin.network.trace import NO_OUTPUTS, Trace, recording
from lightning_basin.operations.recorder import record_operations
from lightning_basin.probe import Probe
from lightning_basin.tensors import map_tensors

_Result = TypeVar("_Result")


class Network:
    """A module as a function from inputs to outputs, whose layers and operations can be looked at.

    Args:
        module: A copy in evaluation mode, which may be run and hooked.
        behavior: A function of the module and inputs that returns the outputs; ``None`` calls the module.
        dtype: The floating point type of the copy.

    Attributes:
        gradient_dtype: The type in which gradients are kept and multiplied, also where the copy is in float32.
        projection: The directions along which the outputs count, shape ``(outputs per input, directions)``; ``None``
            for all outputs.
    """

    def __init__(
        self, module: nn.Module, behavior: ModuleBehavior | None = None, *, dtype: torch.dtype = torch.float64
    ) -> None:
        self.module = module
        self.dtype = dtype
        self.gradient_dtype = torch.float64
        self.layers = find_layers(module)
        self.named_parameters = dict(module.named_parameters())
        self.projection: Tensor | None = None
        self._behavior = call_module if behavior is None else behavior
        self._needs_gradients = False

    def in_precision(self, dtype: torch.dtype) -> "Network":
        """Return a copy of the network that evaluates in another floating point type."""
        module, behavior = replicas(self.module, self._behavior, dtype=dtype)
        network = Network(module, behavior, dtype=dtype)
        network.gradient_dtype = self.gradient_dtype
        network.projection = self.projection
        return network

    def parameters(self, layers: Sequence[Layer] | None = None) -> list[Tensor]:
        """Return the parameters of some layers, in the order of the columns of their gradients."""
        chosen = self.layers if layers is None else layers
        return [self.named_parameters[name] for layer in chosen for name in layer.parameters]

    def outputs(self, probe: Probe) -> Tensor:
        """Return the outputs on a probe, shape ``(k, ...)``; attached to the graph where gradients are enabled."""
        return self._run(lambda: self._outputs(probe), Tensor.detach)

    def call(self, probe: Probe) -> Any:
        """Return whatever the behavior returns on a probe."""
        return call_behavior(self._behavior, self.module, probe, self.dtype)

    def _outputs(self, probe: Probe) -> Tensor:
        return checked_outputs(self.call(probe), probe.size)

    def _run(self, function: Callable[[], _Result], detach: Callable[[_Result], _Result]) -> _Result:
        """Run the module; without gradients where these are disabled, unless the module needs gradients.

        A module that takes derivatives by its inputs (forces, the residual of a differential equation) cannot run
        where gradients are disabled. It is run with gradients, and the result is detached.
        """
        if torch.is_grad_enabled() or not self._needs_gradients:
            try:
                return function()
            except (TypeError, ValueError):
                if torch.is_grad_enabled():
                    raise
        with torch.enable_grad():
            result = function()
        self._needs_gradients = True
        return detach(result)

    @contextmanager
    def at(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the trainable parameters have other values; graphs from before stay valid."""
        trainable = self.parameters()
        before = [parameter.data for parameter in trainable]
        try:
            for parameter, value in zip(trainable, parameters, strict=True):
                parameter.data = value.detach().view_as(parameter)
            yield
        finally:
            for parameter, value in zip(trainable, before, strict=True):
                parameter.data = value

    def project_outputs(self, num_outputs: int, num_directions: int, generator: Generator) -> None:
        """Let the rows of `rows` be the outputs along random orthonormal directions from now on.

        Ranks are then lower bounds, as linear combinations of rows cannot have a higher rank than the rows.
        """
        drawn = torch.randn(num_outputs, num_directions, generator=generator, dtype=torch.float64)
        self.projection = torch.linalg.qr(drawn).Q

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the outputs whose gradients count, shape ``(k, c)``."""
        flat = outputs.reshape(outputs.shape[0], -1)
        return flat if self.projection is None else flat @ self.projection.to(flat)

    def functional(self, probe: Probe, tensors: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the rows for other values of some parameters and inputs; works under `torch.func.vmap`.

        The tensors take the place of those in the probe's inputs. Their number of inputs is free, unless the probe
        holds other things than tensors for each input.
        """
        if tensors[0].shape[0] != probe.size and probe.has_columns:
            raise ValueError("inputs with lists of other things than tensors must be run together")
        remaining = iter(tensors)
        inputs = map_tensors(lambda _: next(remaining).clone(), probe.inputs)
        values = {f"module.{name}": value for name, value in parameters.items()}
        with RaisedPrecision(self.dtype):
            outputs: Tensor = functional_call(_BehaviorModule(self.module, self._behavior), values, (inputs,))
        # The number of rows is that of the inputs, as a behavior may drop the axis of a single input.
        return self.rows(outputs.reshape(tensors[0].shape[0], -1))

    def trace(self, probe: Probe) -> Trace:
        """Run once; record what enters and leaves each layer, and which operations use its parameters."""
        return self._run(lambda: self._trace(probe), Trace.detached)

    def _trace(self, probe: Probe) -> Trace:
        trained = {name: self.named_parameters[name] for layer in self.layers for name in layer.parameters}
        constants = [*self.named_parameters.values(), *self.module.buffers()]
        try:
            with record_operations(trained, constants, num_inputs=probe.size) as operations:
                trace = self._trace_layers(probe)
        except ValueError as error:
            # Torch 2.13 makes no tensor of a subclass by `Tensor.__new__` while operations are recorded.
            if "Creating a new Tensor subclass" not in str(error):
                raise
            return self._trace_layers(probe)
        trace.operations = operations
        return trace

    def trace_layers(self, probe: Probe) -> Trace:
        """Run once; record what enters and leaves each layer."""
        return self._run(lambda: self._trace_layers(probe), Trace.detached)

    def _trace_layers(self, probe: Probe) -> Trace:
        trace = Trace(outputs=NO_OUTPUTS)
        with recording(self.module, self.layers, trace):
            trace.outputs = self._outputs(probe)
        return trace


class _BehaviorModule(nn.Module):
    """A behavior as a module, so that `functional_call` can exchange the parameters of its module."""

    def __init__(self, module: nn.Module, behavior: ModuleBehavior) -> None:
        super().__init__()
        self.module = module
        self._behavior = behavior

    def forward(self, inputs: Any) -> Tensor:
        return self._behavior(self.module, inputs)
