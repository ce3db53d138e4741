"""A network seen layer by layer: which module owns which parameter, what enters and leaves each."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch._C import _DisableFuncTorch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_get_bdim
from torch.func import functional_call

from lightning_basin.copying import is_out_of_memory
from lightning_basin.operations import Operations, recorded_operations
from lightning_basin.precision import RaisedPrecision
from lightning_basin.probe import Probe, map_tensors, tensors_of
from lightning_basin.remedies import remedy

_Result = TypeVar("_Result")

_ROUNDINGS = 32.0  # 1 to 4 in networks of all kinds, of 128 units and 20 layers; twice that between two evaluations

_NO_OUTPUTS = torch.empty(0)  # Until there are some.

_GROWTH = 1e4  # of a rounding where most of what it is part of cancels

ModuleBehavior = Callable[[nn.Module, Any], Tensor]
"""From a module and the inputs of a probe to the outputs, one row per input."""


def rounding_rtol(dtype: torch.dtype) -> float:
    """How far rounding moves a number that a network computes, relative to the largest of its kind.

    Example:
        >>> f"{rounding_rtol(torch.float64):.0e} {rounding_rtol(torch.float32):.1e}"
        '1e-14 3.8e-06'
    """
    return max(1e-14, _ROUNDINGS * torch.finfo(dtype).eps)


def agreement_rtol(dtype: torch.dtype) -> float:
    """To which fraction of the largest number two evaluations agree, as a wrong formula does not.

    Example:
        >>> f"{agreement_rtol(torch.float64):.0e} {agreement_rtol(torch.float32):.1e}"
        '1e-09 1.2e-03'
    """
    return max(1e-9, _GROWTH * torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Layer:
    """A module that directly owns trainable parameters.

    Attributes:
        name: Its name in ``named_modules()``; ``""`` for the root.
        parameters: Full names of the parameters it owns; one shared by two modules belongs to the first.
        num_parameters: Their number of entries.
    """

    name: str
    parameters: tuple[str, ...]
    num_parameters: int


@dataclass(eq=False)
class Trace:
    """What one forward pass showed.

    Attributes:
        outputs: Attached to the graph, one row per input.
        entering: Tensors that entered each layer, over all its calls, in the order of first entry.
        leaving: The (first) tensor that left each call of a layer.
        num_first: How many layers were entered before any had been left: the first one, and what it sits in.
        operations: Those that use trainable parameters.
    """

    outputs: Tensor
    entering: dict[str, list[Tensor]] = field(default_factory=dict)
    leaving: dict[str, list[Tensor]] = field(default_factory=dict)
    num_first: int = 0
    operations: Operations = field(default_factory=Operations)

    def detached(self) -> "Trace":
        """The same without the graph, in which no operation can be found again."""
        entering, leaving = (
            {name: [tensor.detach() for tensor in tensors] for name, tensors in noted.items()}
            for noted in (self.entering, self.leaving)
        )
        operations = Operations(num_elements=self.operations.num_elements)
        return Trace(self.outputs.detach(), entering, leaving, self.num_first, operations)


def find_layers(module: nn.Module) -> tuple[Layer, ...]:
    """The layers of a module, in the order of ``named_modules()``.

    A parameter without elements, as some modules hold one to know their device, is left out like a frozen one.

    Raises:
        ValueError: If the module has no trainable parameters.

    Example:
        >>> [layer.name for layer in find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))]
        ['0', '2']
    """
    seen: set[int] = set()
    layers = []
    for name, part in module.named_modules():
        owned = {
            f"{name}.{own}" if name else own: parameter
            for own, parameter in part.named_parameters(recurse=False)
            if parameter.requires_grad and parameter.numel() > 0 and id(parameter) not in seen
        }
        seen |= {id(parameter) for parameter in owned.values()}
        if owned:
            layers.append(Layer(name, tuple(owned), sum(parameter.numel() for parameter in owned.values())))
    if not layers:
        raise ValueError(
            f"the module must have at least one trainable parameter, got {type(module).__name__} with none: "
            f"set requires_grad=True on those to measure"
        )
    return tuple(layers)


def parameters_in_graph(result: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters on which a result depends, by its graph.

    Args:
        result: A tensor with or without a graph.
        parameters: Tensors that may be in it, by name.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> sorted(parameters_in_graph(layer(torch.ones(1, 2)), dict(layer.named_parameters())))
        ['bias', 'weight']
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: set[str] = set()
    waiting, seen = [result.grad_fn], {result.grad_fn}
    while waiting:
        node = waiting.pop()
        name = names.get(id(getattr(node, "variable", None)))
        found |= set() if name is None else {name}
        for following, _ in () if node is None else node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


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

    def _outputs(self, probe: Probe) -> Tensor:
        hint = "pass behavior=lambda module, inputs: ... that returns one row of outputs per input"
        try:
            inputs = map_tensors(Tensor.clone, probe.inputs)  # A module may write to its input.
            with RaisedPrecision(self.dtype):
                outputs = self._behavior(self.module, inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"calling the module on the inputs failed with {type(error).__name__}: {error}; "
                f"{remedy(error, tensors_of(probe.inputs))}"
            ) from error
        if isinstance(outputs, Tensor):
            outputs = as_plain(outputs)
            if outputs.layout != torch.strided:
                raise TypeError(
                    f"the outputs must be dense, got {outputs.layout}: pass a behavior that returns outputs.to_dense()"
                )
        else:
            raise TypeError(f"the outputs must be a tensor, got {type(outputs).__name__}: {hint}")
        if not outputs.is_floating_point():
            raise TypeError(f"the outputs must be floating point numbers, got {outputs.dtype}: {hint}")
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
        trace = Trace(outputs=_NO_OUTPUTS)
        with _recording(self, trace):
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
        trace = Trace(outputs=_NO_OUTPUTS)
        with _recording(self, trace):
            trace.outputs = self._outputs(probe)
        return trace


def other_batches(num_inputs: int) -> Iterator[list[Tensor]]:
    """Batches in which every input has other company than in the whole, where its part of all results is the same.

    Args:
        num_inputs: k.

    Yields:
        Indices of two random halves; then, for modules that cannot run these, batches of all k in which each half is
        replaced by inputs of the other. Of a single input only itself.
    """
    if num_inputs == 1:
        yield [torch.zeros(1, dtype=torch.int64)]
        return
    order = torch.randperm(num_inputs, generator=Generator().manual_seed(0))
    first, second = (half.sort().values for half in order.tensor_split(2))
    yield [first, second]
    replaced = []
    for kept, others in ((first, second), (second, first)):
        indices = torch.arange(num_inputs)
        indices[others] = kept[torch.arange(others.numel()) % kept.numel()]
        replaced.append(indices)
    yield replaced


def passed_otherwise(network: Network, probe: Probe, *, with_layers: bool = True) -> list[tuple[Tensor, Trace]]:
    """What enters and leaves each layer in the first of `other_batches` that the module can run, without a graph.

    Args:
        network: To run.
        probe: The inputs.
        with_layers: Whether the layers are wanted, and not the outputs alone.

    Returns:
        Indices of the inputs of each batch, and what was noted of it.

    Raises:
        TypeError: See `Network.outputs`.
        ValueError: See `Network.outputs`; if the module can run none of them.
    """

    def run(indices: Tensor) -> tuple[Tensor, Trace]:
        batch = probe.select(indices)
        return indices, network.passed(batch) if with_layers else Trace(network.outputs(batch))

    few, *many = other_batches(probe.size)
    with torch.no_grad():
        try:
            return [run(indices) for indices in few]
        except (TypeError, ValueError):  # Some modules cannot run so few: as many as in the whole they can.
            if not many:
                raise
            return [run(indices) for indices in many[0]]


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


@contextmanager
def _recording(network: Network, trace: Trace) -> Iterator[None]:
    """Hooks on every layer that fill a trace, gone afterwards."""
    handles = []
    clones = _Clones()

    def enter(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not trace.leaving:
                trace.num_first += name not in trace.entering
            trace.entering.setdefault(name, []).extend(map(clones.of, tensors_of((args, kwargs))))

        return hook

    def leave(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            first = [as_plain(tensor) for tensor in tensors_of(output)[:1]]
            trace.leaving.setdefault(name, []).extend(map(without_transforms, first))
            # A clone of a subclass would lack the attributes of the instance.
            return clones.passed_on(output) if type(output) is Tensor else output

        return hook

    try:
        for layer in network.layers:
            part = network.module.get_submodule(layer.name)
            handles.append(part.register_forward_pre_hook(enter(layer.name), with_kwargs=True))
            handles.append(part.register_forward_hook(leave(layer.name), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_plain(tensor: Tensor) -> Tensor:
    """A tensor of a subclass as one of torch, by none of the methods that the subclass overrides.

    Example:
        >>> class Labelled(Tensor): ...
        >>> type(as_plain(torch.ones(1).as_subclass(Labelled))).__name__
        'Tensor'
    """
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def without_transforms(tensor: Tensor) -> Tensor:
    """The numbers of a tensor inside of `torch.func` transforms, which is of no use after these have ended.

    Args:
        tensor: Any tensor; one that is seen by no transform stays as it is.

    Returns:
        With the axes over which `torch.func.vmap` maps in front, that of the outermost one first.

    Example:
        >>> seen = []
        >>> mapped = torch.vmap(lambda x: seen.append(without_transforms(x)) or x)(torch.ones(3, 2))
        >>> seen[0].shape
        torch.Size([3, 2])
    """
    if not is_functorch_wrapped_tensor(tensor):
        return tensor
    while is_functorch_wrapped_tensor(tensor):
        axis = maybe_get_bdim(tensor)  # Negative where the transform is a derivative.
        tensor = get_unwrapped(tensor)
        tensor = tensor if axis < 0 else tensor.movedim(axis, 0)
    with _DisableFuncTorch():
        return tensor.clone()


class _Clones:
    """Tensors as they entered and left layers: what is done in place later cannot change them."""

    def __init__(self) -> None:
        self._left: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def passed_on(self, left: Tensor) -> Tensor:
        """A clone that goes on in place of what left a layer."""
        clone = left.clone()
        self._left[id(clone)] = weakref.ref(clone), left
        return clone

    def of(self, entering: Tensor) -> Tensor:
        """A clone, or what left the layer before, where nothing was done in between: much of all memory."""
        if is_functorch_wrapped_tensor(entering):
            return without_transforms(entering)
        entering = as_plain(entering)
        twin, left = self._left.get(id(entering), (None, entering))
        is_same = twin is not None and twin() is entering and entering.layout == torch.strided
        return left if is_same and torch.equal(left, entering) else entering.clone()


class Chunk:
    """Inputs of a probe that are run at once.

    Args:
        network: To run.
        indices: Where the inputs stand in the whole probe.
        probe: The inputs.
        trace: Of these, where there is one already.
    """

    def __init__(self, network: Network, indices: Tensor, probe: Probe, trace: Trace | None = None) -> None:
        self.indices = indices
        self.probe = probe
        self._network = network
        self._trace = trace

    @property
    def trace(self) -> Trace:
        """What running them shows; they are run when it is asked for."""
        if self._trace is None:
            self._trace = self._network.trace(self.probe)
        return self._trace


class TracedProbe:
    """A probe that a network has been run on, all inputs at once or chunk by chunk where memory asks for it.

    Args:
        network: To run.
        probe: The inputs.
        chunk_size: Inputs per run; the traces of several chunks are not kept, but made anew at each iteration.
    """

    def __init__(self, network: Network, probe: Probe, *, chunk_size: int | None = None) -> None:
        self.network = network
        self.probe = probe
        self.chunk_size = probe.size if chunk_size is None else chunk_size
        self._whole: Trace | None = None

    def chunks(self) -> Iterator[Chunk]:
        """The inputs that are run at once, chunk by chunk."""
        indices = torch.arange(self.probe.size)
        if self.is_whole:
            yield Chunk(self.network, indices, self.probe, self.whole)
            return
        for chosen in indices.tensor_split(-(-self.probe.size // self.chunk_size)):
            yield Chunk(self.network, chosen, self.probe.select(chosen))

    def each(self, function: Callable[..., _Result], *args: Any) -> list[_Result]:
        """What a function makes of each chunk of inputs, in the order of the inputs.

        Args:
            function: A function of the network, a chunk and further arguments.
            args: The further arguments.
        """
        return [function(self.network, chunk, *args) for chunk in self.chunks()]

    @property
    def is_whole(self) -> bool:
        """Whether all inputs are run at once."""
        return self.chunk_size >= self.probe.size

    @property
    def whole(self) -> Trace:
        """The trace of all inputs at once; without a graph, where this would not fit into memory."""
        if self._whole is None:
            with torch.set_grad_enabled(self.is_whole):
                self._whole = self.network.trace(self.probe)
        return self._whole
