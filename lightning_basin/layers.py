"""A network seen layer by layer: who owns which parameter, what enters and leaves, gradients of each.

A layer is a module that directly owns trainable parameters. Nothing is concluded from its type alone: what a layer
type suggests is checked against plain autograd, and the general way taken where they disagree.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_basin.functional.jacobian import behavioral_gradients, gradient_rows
from lightning_basin.functional.sketch import DenseGradients, KhatriRaoGradients, LayerGradients
from lightning_basin.probe import Probe, map_tensors, tensors_of

ModuleBehavior = Callable[[nn.Module, Any], Tensor]
"""From a module and the inputs of a probe to the outputs, one row per input."""

_AGREEMENT_RTOL = 1e-9  # two float64 evaluations of one number agree to about 1e-14; a wrong formula does not
_GROUP_ELEMENTS = 2**27  # float64 numbers in the dense gradients held at once: 1 GiB
_LAYER_ELEMENTS = 2**30  # and in those of one layer: 8 GiB
_CHANNELS_SECOND = (_ConvNd, _NormBase, nn.GroupNorm)


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
    """

    outputs: Tensor
    entering: dict[str, list[Tensor]] = field(default_factory=dict)
    leaving: dict[str, list[Tensor]] = field(default_factory=dict)
    num_first: int = 0


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """Activations of one layer, ordered by input.

    Attributes:
        entering: Everything that enters, flattened, shape ``(k, d)``; ``None`` where nothing that enters has one
            part per input.
        leaving: Outputs with the units last, shape ``(k, positions, units)``; ``None`` likewise.
        rows_per_input: For each tensor that enters, how many of its first-axis rows belong to one input; 0 where it is
            shared by all. Empty where the rows of an input are not adjacent.
    """

    entering: Tensor | None
    leaving: Tensor | None
    rows_per_input: tuple[int, ...]


def find_layers(module: nn.Module) -> tuple[Layer, ...]:
    """The layers of a module, in the order of ``named_modules()``.

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
            if parameter.requires_grad and id(parameter) not in seen
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


class Network:
    """A module as a function from inputs to outputs that can be looked into.

    Args:
        module: A float64 copy in evaluation mode that may be hooked and run at will.
        behavior: From the module and inputs to outputs; ``None`` calls the module.
    """

    def __init__(self, module: nn.Module, behavior: ModuleBehavior | None = None) -> None:
        self.module = module
        self.layers = find_layers(module)
        self._behavior = call_module if behavior is None else behavior
        self._named_parameters = dict(module.named_parameters())

    def parameters(self, layers: Sequence[Layer] | None = None) -> list[Tensor]:
        """Parameters of some or all layers, in the order of the columns of their gradients."""
        chosen = self.layers if layers is None else layers
        return [self._named_parameters[name] for layer in chosen for name in layer.parameters]

    def outputs(self, probe: Probe) -> Tensor:
        """Outputs on a probe, attached to the graph, shape ``(k, ...)``.

        Raises:
            TypeError: If the outputs are not a floating point tensor.
            ValueError: If they do not have one row per input.
        """
        hint = "pass behavior=lambda module, inputs: ... that returns one row of outputs per input"
        try:
            # A copy: a module may write to its input.
            outputs = self._behavior(self.module, map_tensors(Tensor.clone, probe.inputs))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"calling the module on the inputs failed with {type(error).__name__}: {error}; {hint}"
            ) from error
        if not isinstance(outputs, Tensor):
            raise TypeError(f"the outputs must be a tensor, got {type(outputs).__name__}: {hint}")
        if not outputs.is_floating_point():
            raise TypeError(f"the outputs must be floating point numbers, got {outputs.dtype}: {hint}")
        if outputs.ndim == 0 or outputs.shape[0] != probe.size:
            raise ValueError(
                f"the outputs must have one row for each of the {probe.size} inputs, "
                f"got shape {tuple(outputs.shape)}: {hint}"
            )
        return outputs

    def trace(self, probe: Probe, *, replace: "Replacement | None" = None) -> Trace:
        """Run once and note what enters and leaves each layer.

        Args:
            probe: The inputs.
            replace: Changes what enters one layer, at every call.
        """
        trace = Trace(outputs=torch.empty(0))
        with _recording(self, trace, replace):
            trace.outputs = self.outputs(probe)
        return trace

    def gradients(self, probe: Probe, trace: Trace, *, generator: Generator) -> "Iterator[MeasuredGradients]":
        """Behavioral gradients of each layer in turn, checked against autograd.

        Args:
            probe: The inputs.
            trace: Of the probe.
            generator: On the CPU; for the check's random combination of all rows.

        Raises:
            RuntimeError: If no way of computing a layer's gradients agrees with autograd.
            ValueError: If the gradients of a layer do not fit into memory.
        """
        outputs = trace.outputs.reshape(probe.size, -1)
        weights = torch.randn(outputs.numel(), generator=generator, dtype=torch.float64).to(outputs.device)
        expected = self._combined(outputs, weights)
        factored = self._factored(probe, trace)
        waiting = []
        for layer in self.layers:
            gradients = factored.pop(layer.name, None)
            if gradients is not None and self._agree(layer, gradients, weights, expected):
                yield MeasuredGradients(layer, gradients)
            else:
                note = None
                if gradients is not None:
                    note = f"layer {layer.name!r} is measured row by row: it does not act as a plain linear layer"
                waiting.append((layer, note))
        for group in _groups(waiting, outputs.numel()):
            yield from self._dense(probe, group, outputs, weights, expected)

    def _combined(self, outputs: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """One random combination of all rows, by layer: what every route must reproduce."""
        parameters = self.parameters()
        if outputs.requires_grad:
            flat = outputs.flatten()
            combined = torch.autograd.grad(flat, parameters, weights, retain_graph=True, materialize_grads=True)
        else:
            combined = tuple(torch.zeros_like(parameter) for parameter in parameters)
        remaining = iter(combined)
        return {name: next(remaining).flatten() for layer in self.layers for name in layer.parameters}

    def _agree(self, layer: Layer, gradients: LayerGradients, weights: Tensor, expected: dict[str, Tensor]) -> bool:
        found = gradients.combination(weights)
        wanted = [expected[name] for name in layer.parameters]
        # What is below the rounding of the layer's largest entry is nothing.
        floor = 1e-14 * float(torch.cat(wanted).abs().max())
        for part in wanted:
            difference, found = (found[: part.numel()] - part).abs(), found[part.numel() :]
            if bool((difference > _AGREEMENT_RTOL * part.abs().max() + floor).any()):
                return False
        return True

    def _factored(self, probe: Probe, trace: Trace) -> dict[str, KhatriRaoGradients]:
        """Gradients of linear layers from what enters them and the derivative by what leaves them."""
        linear = [layer for layer in self.layers if self._is_linear(layer, trace, probe.size)]
        left = [tensor for layer in linear for tensor in trace.leaving[layer.name]]
        outputs = trace.outputs.reshape(probe.size, -1)
        if not left or not outputs.requires_grad:
            return {}
        passes = [
            torch.autograd.grad(outputs[:, j].sum(), left, retain_graph=True, materialize_grads=True)
            for j in range(outputs.shape[1])
        ]
        by_call = iter([torch.stack([column[i] for column in passes]) for i in range(len(left))])
        return {layer.name: self._khatri_rao(layer, trace, probe.size, by_call) for layer in linear}

    def _is_linear(self, layer: Layer, trace: Trace, num_inputs: int) -> bool:
        part = self.module.get_submodule(layer.name)
        entering, leaving = trace.entering.get(layer.name, []), trace.leaving.get(layer.name, [])
        return (
            isinstance(part, nn.Linear)
            and {name.rpartition(".")[2] for name in layer.parameters} <= {"weight", "bias"}
            and 0 < len(entering) == len(leaving)
            and all(tensor.ndim > 1 and tensor.shape[0] % num_inputs == 0 for tensor in entering)
            and all(tensor.requires_grad for tensor in leaving)
        )

    def _khatri_rao(self, layer: Layer, trace: Trace, num_inputs: int, by_call: Iterator[Tensor]) -> KhatriRaoGradients:
        entering, signals = [], []
        for tensor in trace.entering[layer.name]:
            entering.append(tensor.detach().reshape(num_inputs, -1, tensor.shape[-1]))
            signal = next(by_call)
            signals.append(signal.reshape(signal.shape[0], num_inputs, -1, signal.shape[-1]).transpose(0, 1))
        activations = torch.cat(entering, dim=1)
        owned = {name.rpartition(".")[2] for name in layer.parameters}
        columns = [activations] if "weight" in owned else []
        if "bias" in owned:
            columns.append(activations.new_ones(*activations.shape[:2], 1))
        return KhatriRaoGradients(torch.cat(columns, dim=2), torch.cat(signals, dim=2), "bias" in owned)

    def _dense(
        self,
        probe: Probe,
        group: Sequence[tuple[Layer, str | None]],
        outputs: Tensor,
        weights: Tensor,
        expected: dict[str, Tensor],
    ) -> "Iterator[MeasuredGradients]":
        layers = [layer for layer, _ in group]
        pending = list(group)
        for rows_of in (self._rows_at_once, self._rows_one_by_one, self._rows_of_batch):
            try:
                matrix = rows_of(probe, layers, outputs)
            except (RuntimeError, TypeError, ValueError, NotImplementedError):
                # vmap, or a batch of one, is beyond some modules; the next way asks for less.
                if rows_of == self._rows_of_batch:
                    raise
                continue
            blocks = torch.split(matrix, [layer.num_parameters for layer in layers], dim=1)
            measured = dict(zip((layer.name for layer in layers), map(DenseGradients, blocks), strict=True))
            failed = []
            for layer, note in pending:
                if self._agree(layer, measured[layer.name], weights, expected):
                    yield MeasuredGradients(layer, measured[layer.name], note)
                else:
                    failed.append((layer, note))
            pending = failed
            if not pending:
                return
        names = [layer.name for layer, _ in pending]
        raise RuntimeError(f"the gradients of layers {names} cannot be computed: two evaluations of them disagree")

    def _rows_at_once(self, probe: Probe, layers: Sequence[Layer], outputs: Tensor) -> Tensor:
        """All inputs of a chunk in one batched differentiation."""
        parameters = {name: self._named_parameters[name].detach() for layer in layers for name in layer.parameters}
        wrapper = _Behaving(self.module, self._behavior)

        def behavior(values: Any, tensors: Sequence[Tensor]) -> Tensor:
            remaining = iter(tensors)
            inputs = map_tensors(lambda _: next(remaining).clone(), probe.inputs)
            renamed = {f"module.{name}": value for name, value in values.items()}
            rows: Tensor = functional_call(wrapper, renamed, (inputs,))
            return rows

        return behavioral_gradients(behavior, parameters, tensors_of(probe.inputs))

    def _rows_one_by_one(self, probe: Probe, layers: Sequence[Layer], outputs: Tensor) -> Tensor:
        """A forward pass for each input, a backward pass for each output."""
        parameters = self.parameters(layers)
        rows = [gradient_rows(self.outputs(probe.select([index])), parameters) for index in range(probe.size)]
        return torch.cat(rows)

    def _rows_of_batch(self, probe: Probe, layers: Sequence[Layer], outputs: Tensor) -> Tensor:
        """A backward pass through the whole batch for each row: always possible, and the slowest."""
        return gradient_rows(outputs, self.parameters(layers))

    def activations(self, probe: Probe, trace: Trace) -> dict[str, LayerActivations]:
        """What enters and leaves each called layer, input by input, in the order of first entry.

        Which axis of a tensor counts the inputs is found by running single inputs: a tensor whose shape does not
        grow with their number is shared, one whose rows agree is sliced, any other is collected input by input.

        Args:
            probe: The inputs.
            trace: Of the probe.
        """
        with torch.no_grad():
            return _LayoutByExample(self, probe, trace).activations()

    def cuts(self, probe: Probe, trace: Trace, activations: dict[str, LayerActivations]) -> Iterator[tuple[str, int]]:
        """Layers whose input is all that crosses, with the number of parameters used before it.

        Found by computing: where what enters a layer is rolled from each input to the next, and all outputs and
        gradients with respect to later parameters roll along, nothing else about an input gets past the layer. A
        branch beside a skip connection fails this, also one whose skip has weight zero: its gradient does not roll.

        Args:
            probe: The inputs.
            trace: Of the probe.
            activations: Of the probe.

        Yields:
            Name of the layer, and number of entries of all parameters that what enters it depends on.
        """
        for name, layer in activations.items():
            called_once = len(trace.leaving.get(name, [])) == 1  # Later calls see the earlier ones already rolled.
            if not layer.rows_per_input or not called_once:
                continue
            before = self._used_before(trace.entering[name])
            rolled = self.trace(probe, replace=Replacement(name, layer.rows_per_input)).outputs
            tolerance = _AGREEMENT_RTOL * float(trace.outputs.detach().abs().max())
            if float((rolled - trace.outputs.roll(1, 0)).detach().abs().max()) > tolerance:
                continue
            after = [parameter for parameter, used in zip(self.parameters(), before, strict=True) if not used]
            if self._gradients_roll(trace.outputs, rolled, after):
                yield name, sum(p.numel() for p, used in zip(self.parameters(), before, strict=True) if used)

    def _used_before(self, entering: Sequence[Tensor]) -> list[bool]:
        """For each parameter whether what enters a layer depends on it."""
        attached = [tensor for tensor in entering if tensor.requires_grad]
        parameters = self.parameters()
        if not attached:
            return [False] * len(parameters)
        ones = [torch.ones_like(tensor) for tensor in attached]
        gradients = torch.autograd.grad(attached, parameters, ones, retain_graph=True, allow_unused=True)
        return [gradient is not None for gradient in gradients]

    @staticmethod
    def _gradients_roll(outputs: Tensor, rolled: Tensor, parameters: Sequence[Tensor]) -> bool:
        """Whether rolled outputs have the rolled gradients, seen in one random combination of the rows."""
        if not parameters or not outputs.requires_grad or not rolled.requires_grad:
            return True
        generator = Generator().manual_seed(0)
        weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
        expected = torch.autograd.grad(
            outputs, parameters, weights.roll(-1, 0), retain_graph=True, materialize_grads=True
        )
        found = torch.autograd.grad(rolled, parameters, weights, materialize_grads=True)
        tolerance = _AGREEMENT_RTOL * max(float(gradient.abs().max()) for gradient in expected)
        pairs = zip(found, expected, strict=True)
        return all(float((gradient - wanted).abs().max()) <= tolerance for gradient, wanted in pairs)


@dataclass(frozen=True, eq=False)
class MeasuredGradients:
    """Behavioral gradients of one layer.

    Attributes:
        layer: Whose.
        gradients: Rows ordered by input, then output.
        note: What a reader should know about how they were obtained.
    """

    layer: Layer
    gradients: LayerGradients
    note: str | None = None


@dataclass(frozen=True)
class Replacement:
    """Rolls what enters a layer by one input.

    Attributes:
        name: Of the layer.
        rows_per_input: See `LayerActivations`.
    """

    name: str
    rows_per_input: tuple[int, ...]

    def __call__(self, arguments: Any) -> Any:
        """The arguments of the layer's call with each input's part moved to the next input."""
        rows = iter(self.rows_per_input)
        return map_tensors(lambda tensor: tensor.roll(next(rows), 0), arguments)


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
    if isinstance(inputs, dict) and all(isinstance(key, str) for key in inputs):
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
def _recording(network: Network, trace: Trace, replace: Replacement | None) -> Iterator[None]:
    """Hooks on every layer that fill a trace, gone afterwards."""
    handles = []

    def enter(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if replace is not None and replace.name == name:
                args, kwargs = replace((args, kwargs))
            if not trace.leaving:
                trace.num_first += name not in trace.entering
            # Clones, here and below: what is done in place later cannot change what entered and left.
            trace.entering.setdefault(name, []).extend(tensor.clone() for tensor in tensors_of((args, kwargs)))
            return args, kwargs

        return hook

    def leave(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            first = tensors_of(output)[:1]
            trace.leaving.setdefault(name, []).extend(first)
            return output.clone() if isinstance(output, Tensor) else output

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


def _groups(waiting: Sequence[tuple[Layer, str | None]], num_rows: int) -> Iterator[list[tuple[Layer, str | None]]]:
    """Layers whose dense gradients fit into memory together."""
    group: list[tuple[Layer, str | None]] = []
    size = 0
    for layer, note in waiting:
        elements = layer.num_parameters * num_rows
        if elements > _LAYER_ELEMENTS:
            raise ValueError(
                f"the gradients of layer {layer.name!r} must fit into {_LAYER_ELEMENTS * 8 / 2**30:.0f} GiB, but "
                f"{num_rows} rows x {layer.num_parameters} parameters need {elements * 8 / 2**30:.0f} GiB: "
                f"take a smaller probe or fewer outputs"
            )
        if group and size + elements > _GROUP_ELEMENTS:
            yield group
            group, size = [], 0
        group.append((layer, note))
        size += elements
    if group:
        yield group


class _LayoutByExample:
    """Finds which part of each traced tensor belongs to which input."""

    def __init__(self, network: Network, probe: Probe, trace: Trace) -> None:
        self._network = network
        self._probe = probe
        self._trace = trace
        self._ends = [self._single(0), self._single(probe.size - 1)]
        self._singles: list[Trace] | None = None

    def _single(self, index: int) -> Trace | None:
        try:
            return self._network.trace(self._probe.select([index]))
        except (RuntimeError, TypeError, ValueError, IndexError):  # Some modules cannot run a batch of one.
            return None

    def activations(self) -> dict[str, LayerActivations]:
        found = {}
        for name, tensors in self._trace.entering.items():
            entering, rows = self._by_input(tensors, partial(_entering, name))
            leaving, _ = self._by_input(_leaving(name, self._trace), partial(_leaving, name))
            part = self._network.module.get_submodule(name)
            found[name] = LayerActivations(
                entering=torch.cat([tensor.flatten(1) for tensor in entering], dim=1) if entering else None,
                leaving=_units_last(part, leaving),
                rows_per_input=rows,
            )
        return found

    def _by_input(
        self, tensors: Sequence[Tensor], of: Callable[[Trace], list[Tensor]]
    ) -> tuple[list[Tensor], tuple[int, ...]]:
        """The tensors that have a part per input, each as ``(k, rows, ...)``, and how all are laid out."""
        num_inputs = self._probe.size
        tensors = [tensor.detach().to(torch.float64) for tensor in tensors]
        first, last = self._ends
        if num_inputs == 1 or first is None or last is None:
            kept = [tensor for tensor in tensors if tensor.ndim and tensor.shape[0] == num_inputs]
            adjacent = len(kept) == len(tensors)
            return [tensor.unsqueeze(1) for tensor in kept], (1,) * len(tensors) if adjacent else ()
        singles = list(zip(of(first), of(last), strict=False))
        if len(singles) == len(tensors):
            layouts = [_layout(tensor, *ends, num_inputs) for tensor, ends in zip(tensors, singles, strict=True)]
            if None not in layouts:
                rows = tuple(layout for layout in layouts if layout is not None)
                sliced = [
                    tensor.reshape(num_inputs, count, *tensor.shape[1:])
                    for tensor, count in zip(tensors, rows, strict=True)
                    if count
                ]
                return sliced, rows
        return self._collected(of), ()

    def _collected(self, of: Callable[[Trace], list[Tensor]]) -> list[Tensor]:
        """Tensors put together from runs of single inputs; none where these differ in shape."""
        if self._singles is None:
            runs = [self._single(index) for index in range(self._probe.size)]
            self._singles = [run for run in runs if run is not None]
        shapes = {tuple(tensor.shape for tensor in of(run)) for run in self._singles}
        if len(shapes) != 1 or len(self._singles) < self._probe.size:
            return []
        columns = zip(*(of(run) for run in self._singles), strict=True)
        return [torch.stack([tensor.to(torch.float64) for tensor in column]) for column in columns]


def _entering(name: str, trace: Trace) -> list[Tensor]:
    return trace.entering.get(name, [])


def _leaving(name: str, trace: Trace) -> list[Tensor]:
    return trace.leaving.get(name, [])


def _layout(tensor: Tensor, first: Tensor, last: Tensor, num_inputs: int) -> int | None:
    """Rows per input of a tensor, 0 where it does not grow with their number, ``None`` where they are not adjacent."""
    if tensor.shape == first.shape:
        return 0
    if not tensor.ndim or tensor.shape != (num_inputs * first.shape[0], *first.shape[1:]):
        return None
    rows = tensor.reshape(num_inputs, -1)
    tolerance = _AGREEMENT_RTOL * float(tensor.abs().max()) if tensor.numel() else 0.0
    for found, alone in ((rows[0], first), (rows[-1], last)):
        if bool(((found - alone.flatten()).abs() > tolerance).any()):
            return None
    return int(first.shape[0])


def _units_last(part: nn.Module, tensors: Sequence[Tensor]) -> Tensor | None:
    """Outputs of all calls as ``(k, positions, units)``."""
    if not tensors:
        return None
    moved = []
    for tensor in tensors:
        # Traced tensors carry one axis more, the rows per input; channels were second without it.
        axis = 2 - tensor.ndim if isinstance(part, _CHANNELS_SECOND) else -1
        ordered = tensor.movedim(axis, -1)
        moved.append(ordered.reshape(tensor.shape[0], -1, ordered.shape[-1]))
    return torch.cat(moved, dim=1) if len({tensor.shape[-1] for tensor in moved}) == 1 else moved[0]
