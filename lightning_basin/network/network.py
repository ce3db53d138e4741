"""A module as a function from inputs to outputs that can be looked into."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from lightning_basin.network.layers import Layer, find_layers
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.remedies import cause, is_out_of_memory, remedy
from lightning_basin.network.replica import replicas
from lightning_basin.network.trace import NO_OUTPUTS, Trace, as_plain, recording
from lightning_basin.operations.recorder import recorded_operations
from lightning_basin.probe import Probe
from lightning_basin.tensors import dense_form, described, map_tensors, tensors_of

_Result = TypeVar("_Result")

ModuleBehavior = Callable[[nn.Module, Any], Tensor]
"""From a module and the inputs of a probe to the outputs, one row per input."""


class Network:
    """A module as a function from inputs to outputs that can be looked into.

    Args:
        module: A copy in evaluation mode that may be hooked and run at will.
        behavior: From the module and inputs to outputs; ``None`` calls the module.
        dtype: Of the copy.
        gradient_dtype: In which its gradients are kept and multiplied; by default also where the copy is in float32.
    """

    def __init__(
        self,
        module: nn.Module,
        behavior: ModuleBehavior | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        gradient_dtype: torch.dtype = torch.float64,
    ) -> None:
        self.module = module
        self.dtype = dtype
        self.gradient_dtype = gradient_dtype
        self.layers = find_layers(module)
        self.named_parameters = dict(module.named_parameters())
        self._behavior = call_module if behavior is None else behavior
        self.projection: Tensor | None = None
        self._needs_gradients = False

    def in_precision(self, dtype: torch.dtype) -> "Network":
        """Return a copy of the network that evaluates in another dtype.

        Args:
            dtype: The dtype of the copy.

        Raises:
            TypeError: See `replicas`.
        """
        module, behavior = replicas(self.module, self._behavior, dtype=dtype)
        network = Network(module, behavior, dtype=dtype, gradient_dtype=self.gradient_dtype)
        network.projection = self.projection
        return network

    def parameters(self, layers: Sequence[Layer] | None = None) -> list[Tensor]:
        """Parameters of some or all layers, in the order of the columns of their gradients."""
        chosen = self.layers if layers is None else layers
        return [self.named_parameters[name] for layer in chosen for name in layer.parameters]

    def outputs(self, probe: Probe) -> Tensor:
        """Outputs on a probe, shape ``(k, ...)``; attached to the graph where gradients are enabled.

        Raises:
            TypeError: If the outputs are not a floating point tensor.
            ValueError: If they do not have one row per input.
        """
        return self._run(lambda: self._outputs(probe), Tensor.detach)

    def _run(self, function: Callable[[], _Result], detach: Callable[[_Result], _Result]) -> _Result:
        """Call a function of the module; without gradients where these are disabled, unless the module needs them.

        A module that takes derivatives by its inputs (forces, the residual of a differential equation) cannot run
        where gradients are disabled, and is run with them.

        Args:
            function: Runs the module.
            detach: From what it returns to the same without the graph.
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

    def called(self, probe: Probe) -> Any:
        """Whatever the behavior makes of a probe.

        Raises:
            ValueError: If it raises, unless memory has run out.
        """
        try:
            inputs = map_tensors(Tensor.clone, probe.inputs)  # A module may write to its input.
            with RaisedPrecision(self.dtype):
                return self._behavior(self.module, inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"calling the module on the inputs failed with {cause(error)}; "
                f"{remedy(error, tensors_of(probe.inputs))}"
            ) from error

    def _outputs(self, probe: Probe) -> Tensor:
        hint = "pass behavior=lambda module, inputs: ... that returns one row of outputs per input"
        outputs = self.called(probe)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"the outputs must be a tensor, got {described(outputs)}: {hint}")
        if (dense := dense_form(outputs)) is not None:
            raise TypeError(
                f"the outputs must be dense, got {dense.kind}: pass a behavior that returns outputs.{dense.method}"
            )
        outputs = as_plain(outputs)
        if not outputs.is_floating_point():
            before = "torch.view_as_real of these" if outputs.is_complex() else "the numbers that these are made from"
            raise TypeError(
                f"the outputs must be floating point numbers, got {outputs.dtype}: pass behavior=lambda module, "
                f"inputs: ... that returns {before}"
            )
        if outputs.ndim == 0 or outputs.shape[0] != probe.size:
            raise ValueError(
                f"the outputs must have one row for each of the {probe.size} inputs, "
                f"got shape {tuple(outputs.shape)}: {hint}"
            )
        return outputs

    @contextmanager
    def at(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """The network with other values of its trainable parameters for a while; graphs that there are stay valid.

        Args:
            parameters: In the order and with as many entries as those of `parameters`.
        """
        own = self.parameters()
        before = [parameter.data for parameter in own]
        try:
            for parameter, value in zip(own, parameters, strict=True):
                parameter.data = value.detach().view_as(parameter)
            yield
        finally:
            for parameter, value in zip(own, before, strict=True):
                parameter.data = value

    def project_outputs(self, num_outputs: int, num_directions: int, generator: Generator) -> None:
        """From now on let the rows of `rows` be the outputs along random orthonormal directions.

        Ranks of what is left are lower bounds on ranks of the whole, as those of any rows combined are.

        Args:
            num_outputs: Outputs per input, c.
            num_directions: At most c.
            generator: On the CPU.
        """
        drawn = torch.randn(num_outputs, num_directions, generator=generator, dtype=torch.float64)
        self.projection = torch.linalg.qr(drawn).Q

    def rows(self, outputs: Tensor) -> Tensor:
        """Outputs whose gradients count, shape ``(k, c)``, from those of the module, shape ``(k, ...)``."""
        flat = outputs.reshape(outputs.shape[0], -1)
        return flat if self.projection is None else flat @ self.projection.to(flat)

    def functional(self, probe: Probe, tensors: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        """Rows for other values of some parameters and of the probe's tensors; works under `torch.func.vmap`.

        Args:
            probe: Gives the structure of the inputs.
            tensors: In place of those of the probe, any number of inputs.
            parameters: By full name.

        Raises:
            ValueError: If the probe holds other things than tensors for each input, and fewer inputs are asked for.
        """
        if tensors[0].shape[0] != probe.size and probe.has_columns:
            raise ValueError("inputs with lists of other things than tensors must be run together")
        remaining = iter(tensors)
        inputs = map_tensors(lambda _: next(remaining).clone(), probe.inputs)
        renamed = {f"module.{name}": value for name, value in parameters.items()}
        with RaisedPrecision(self.dtype):
            outputs: Tensor = functional_call(_Behaving(self.module, self._behavior), renamed, (inputs,))
        # By what the inputs are, as a behavior may drop the axis of a batch of one.
        return self.rows(outputs.reshape(tensors[0].shape[0], -1))

    def layers_run_by(self, function: Callable[[], Any]) -> list[str]:
        """Names of the layers that are called while a function runs."""
        trace = Trace(outputs=NO_OUTPUTS)
        with recording(self.module, self.layers, trace):
            function()
        return list(trace.entering)

    def trace(self, probe: Probe) -> Trace:
        """Run once and note what enters and leaves each layer, and which operations use its parameters.

        Args:
            probe: The inputs.
        """
        return self._run(lambda: self._trace(probe), Trace.detached)

    def _trace(self, probe: Probe) -> Trace:
        trained = {name: self.named_parameters[name] for layer in self.layers for name in layer.parameters}
        constants = [*self.named_parameters.values(), *self.module.buffers()]
        try:
            with recorded_operations(trained, constants, num_inputs=probe.size) as operations:
                trace = self._passed(probe)
        except ValueError as error:
            # Torch 2.13 makes no tensor of a subclass by `Tensor.__new__` while operations are recorded.
            if "Creating a new Tensor subclass" not in str(error):
                raise
            return self._passed(probe)
        trace.operations = operations
        return trace

    def passed(self, probe: Probe) -> Trace:
        """Run once and note what enters and leaves each layer.

        Args:
            probe: The inputs.
        """
        return self._run(lambda: self._passed(probe), Trace.detached)

    def _passed(self, probe: Probe) -> Trace:
        trace = Trace(outputs=NO_OUTPUTS)
        with recording(self.module, self.layers, trace):
            trace.outputs = self._outputs(probe)
        return trace


def call_module(module: nn.Module, inputs: Any) -> Any:
    """Call a module on the inputs of a probe, unpacked as its ``forward`` takes them.

    A dict whose keys are parameters of ``forward`` becomes keyword arguments, a tuple or list that fits its positional
    parameters becomes those; anything else is passed as one argument.

    Example:
        >>> call_module(nn.Bilinear(1, 1, 1), (torch.ones(2, 1), torch.ones(2, 1))).shape
        torch.Size([2, 1])
    """
    signature = inspect.signature(module.forward)
    named = set(signature.parameters)
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        # With **kwargs every dict would bind: then one key must name a parameter, or no single argument be possible.
        if _binds(signature, **inputs) and (named & set(inputs) or not _binds(signature, inputs)):
            return module(**inputs)
    elif isinstance(inputs, tuple | list) and _binds(signature, *inputs):
        return module(*inputs)
    return module(inputs)


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


class _Behaving(nn.Module):
    """A behavior as a module, so that `functional_call` can exchange the parameters it works with."""

    def __init__(self, module: nn.Module, behavior: ModuleBehavior) -> None:
        super().__init__()
        self.module = module
        self._behavior = behavior

    def forward(self, inputs: Any) -> Tensor:
        return self._behavior(self.module, inputs)


LossFunction = Callable[[Tensor, Any], Tensor]
"""From the outputs and the targets of a probe to a scalar."""
