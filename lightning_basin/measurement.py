"""One measurement: a module and a probe in, a record out. The only place where the quantities meet."""

import numbers
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import or_
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_basin.activations import (
    InputLayout,
    LayerActivations,
    Passage,
    input_layout,
    joined_passages,
    layer_activations,
    merging_error,
    parameters_before,
    passage,
    streamed_classes,
)
from lightning_basin.copying import is_out_of_memory
from lightning_basin.curvature import HESSIAN_MODES, MAX_DENSE_PARAMETERS, HessianMeasurement, HessianMode
from lightning_basin.evaluation_mode import as_trained
from lightning_basin.functional.duplicates import (
    DirectionsOfMerged,
    dead_units,
    duplicate_classes,
    duplicated_activations,
    gradient_rank_bound,
    merged_directions,
    merged_linear_directions,
    nested_rank_bound,
)
from lightning_basin.functional.hessian import NullSpace
from lightning_basin.functional.output_curvature import softmax_jacobian
from lightning_basin.functional.rank import GradientRank, Spectrum, check_rtol
from lightning_basin.gradients import GROUP_ELEMENTS, AutogradCheck, layer_gradients
from lightning_basin.layers import (
    Layer,
    ModuleBehavior,
    Network,
    Trace,
    TracedProbe,
    agreement_rtol,
    call_module,
    other_batches,
    passed_otherwise,
    rounding_rtol,
)
from lightning_basin.naming import escaped
from lightning_basin.plan import MeasurementPlan, plan_measurement
from lightning_basin.precision import RaisedPrecision
from lightning_basin.probe import Probe, float64_device, tensors_of
from lightning_basin.ranks import Part, RankMeasurement
from lightning_basin.record import BasinRecord, LayerRecord, MergedInput, layer_blocks
from lightning_basin.remedies import needs_float32
from lightning_basin.replica import at_rest, isolated_evaluation, replicas, settle_embeddings
from lightning_basin.rounding import rounding_noise
from lightning_basin.training_set import as_probes

LossFunction = Callable[[Tensor, Any], Tensor]
"""From the outputs and the targets of a probe to a scalar."""


@dataclass(frozen=True)
class Probabilities:
    """Probabilities as the behavior whose gradients count: the softmax over the second axis of a module's outputs.

    The loss still takes the outputs themselves.

    Attributes:
        outputs: From the module and the inputs to the outputs, shape ``(k, classes, ...)``.
    """

    outputs: ModuleBehavior = call_module


Behavior = ModuleBehavior | Probabilities | Literal["outputs", "probabilities"]

LayerSelection = Literal["auto", "all"] | Sequence[str]

Precision = Literal["float64", "float32"]
"""What a network is run and differentiated in; everything behind it is computed in float64."""

DTYPES = {"float64": torch.float64, "float32": torch.float32}
"""Floating point types by the names that measurements take."""

MAX_ROWS = 4096
"""Largest number of outputs on a probe: each decomposition then takes about ten seconds on two cores."""

AUTO_ROWS = 2048
"""What ``max_outputs="auto"`` brings larger numbers down to."""

_FEW = 2  # inputs that are run at once, where not all are; some modules cannot run a batch of one


def measure_basin(
    module: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss_fn: LossFunction | Literal["behavioral"] | None = None,
    behavior: Behavior | None = None,
    layers: LayerSelection = "all",
    hessian: HessianMode = "auto",
    rtol: float | None = None,
    duplicate_rtol: float = 1e-6,
    duplicates_over: Any = None,
    max_outputs: int | Literal["auto"] | None = None,
    spectrum: bool = True,
    memory_budget: int | None = None,
    dtype: Precision = "float64",
    seed: int = 0,
    step: int | None = None,
) -> BasinRecord:
    """Measure how flat the basin of a network is, and where it loses information.

    The module is copied, evaluated in evaluation mode, in float64 unless told otherwise, and left as it was; so are all
    random states.

    Args:
        module: Any module, of any floating point type, on any device.
        inputs: A tensor, or a tuple or dict of tensors, with the k inputs along their first axis; or a `Probe`.
        targets: What ``loss_fn`` takes as its second argument.
        loss_fn: From outputs and targets to a scalar. Without it loss and Hessian are not measured. ``"behavioral"``
            takes the outputs as they are for targets, in squared error: its Hessian is 2 GᵀG at any weights, and there
            is no loss to report.
        behavior: From the module and the inputs to the outputs whose gradients count, shape ``(k, ...)``. ``None`` or
            ``"outputs"`` calls the module, unpacking a tuple or dict as its ``forward`` takes it. ``"probabilities"``
            counts the gradients of the softmax over the second axis of these, where torch's cross-entropy has the
            classes, while ``loss_fn`` still takes the outputs before the softmax.
        layers: ``"all"``, ``"auto"`` (blocks beside the layers where these are more than 32), or names of
            layers to report.
        hessian: ``"auto"`` brackets its nullity by some 30 products at any size, and up to 500 parameters forms it
            too; ``"dense"`` forms it always, ``"bracket"`` never; ``"gauss-newton"`` takes no product and measures
            ``gauss_newton_nullity`` only; ``False`` measures nothing of it.
        rtol: Relative tolerance of ranks; ``None`` means ``max(shape) * eps`` of the matrix that is decomposed, eps of
            ``dtype``.
        duplicate_rtol: Two activations are the same when they differ by at most this, relative to the largest.
        duplicates_over: A whole training set over which duplicated activations are counted too: a map-style data set
            or a ``DataLoader`` of one (read in the order of its indices, without the loader's workers and shuffling),
            or batches that can be iterated over several times, each a tensor, a pair of inputs and targets, or a
            `Probe`. It is streamed two times or more.
        max_outputs: Where a module has more outputs per input, measure the gradients of so many random orthonormal
            combinations of them; ranks are then lower bounds, and the Hessian is left out. ``"auto"`` does so where
            there are more than ``MAX_ROWS`` outputs on the probe, ``None`` refuses these.
        spectrum: Whether singular values are wanted where the rank can be proved without them, several times as fast;
            without, effective ranks and most ranks at coarser tolerances are then left out.
        memory_budget: Bytes that the measurement may use beside what the process holds; ``None`` means half of what is
            free. Inputs and layers are then measured in pieces where that is needed.
        dtype: ``"float32"`` runs and differentiates the copy in float32: half the memory of the graph, and the fast
            type of many accelerators. What comes out is decomposed in float64 all the same, but what is below its
            rounding cannot be told from zero: a note in the record says where that begins. Activations then are the
            same within 4e-6 at least, and the Hessian is left out.
        seed: Of the sketch's random vectors: same seed, same numbers.
        step: Noted in the record.

    Raises:
        TypeError: If there is no input tensor, the outputs are not a floating point tensor, ``duplicates_over`` can be
            iterated over only once, or an argument has another type.
        ValueError: If there is nothing to measure (no trainable parameters, inputs or outputs), outputs or loss are not
            finite, targets are missing, inputs influence each other's outputs, or a value is out of range.
        MemoryBudgetError: A ValueError, if it cannot be cut to ``memory_budget``.

    Warns:
        UserWarning: If the Hessian cannot be formed, or the training set not be evaluated; everything else is then
            measured without it.

    Example:
        Three inputs on a line see two of the three parameters of a linear layer with 2 inputs and 1 output:

        >>> layer = nn.Linear(2, 1)
        >>> record = measure_basin(layer, torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
        >>> record.gradient_rank, record.gradient_rank_deficit, record.gradient_nullity
        (2, 1, 1)
    """
    started = time.perf_counter()
    _check_order(module, inputs, targets)
    probe = inputs if isinstance(inputs, Probe) else Probe(inputs, targets)
    _check_settings(probe, loss_fn, behavior, hessian, rtol, duplicate_rtol, max_outputs, layers, memory_budget, dtype)
    if not _is_number(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if dtype == "float32":
        duplicate_rtol = max(duplicate_rtol, rounding_rtol(torch.float32))
    training_set = None if duplicates_over is None else as_probes(duplicates_over)
    generator = Generator().manual_seed(seed)
    has_hessian = loss_fn is not None and hessian is not False and dtype == "float64"

    def planned(network: Network, few: Probe, trace: Trace) -> MeasurementPlan:
        num_outputs = _num_directions(probe.size, network.rows(trace.outputs).shape[1], max_outputs)
        _check_num_rows(probe.size, num_outputs)
        parts = _selected_parts(network.layers, layers)
        num_parameters = parts[-1].num_parameters
        return plan_measurement(
            network,
            few,
            trace,
            num_inputs=probe.size,
            num_outputs=num_outputs,
            num_blocks=sum(part.kind == "block" for part in parts),
            with_readout=isinstance(behavior, Probabilities) or behavior == "probabilities",
            with_hessian=has_hessian,
            with_dense_hessian=has_hessian
            and (hessian == "dense" or (hessian == "auto" and num_parameters <= MAX_DENSE_PARAMETERS)),
            memory_budget=memory_budget,
        )

    with evaluated(
        module,
        probe,
        _loss_function(loss_fn),
        _outputs_of(behavior),
        planned,
        dtype=DTYPES[dtype],
        with_layout=True,
    ) as evaluation:
        notes = list(evaluation.notes)
        num_directions = _num_directions(probe.size, evaluation.num_outputs, max_outputs)
        projected = num_directions < evaluation.num_outputs
        if projected:
            notes.append(
                f"ranks are lower bounds: the {evaluation.num_outputs} outputs of each input are seen along "
                f"{num_directions} random orthonormal directions"
            )
            _check_projection(behavior)
            evaluation.network.project_outputs(evaluation.num_outputs, num_directions, generator)
        parts = _selected_parts(evaluation.network.layers, layers)
        readout = _readout(evaluation, behavior)
        curvature = _curvature(evaluation, parts, hessian, rtol, seed, is_plain=readout is None, notes=notes)
        ranks, spectra = _measured_gradients(
            evaluation, parts, rtol, generator, readout, curvature, spectrum=spectrum, notes=notes
        )
        null_spaces = _measured_hessian(curvature, spectra, notes)
        resolution = ranks[parts[-1]].rtol
        duplicates = _measured_duplicates(evaluation, duplicate_rtol, ranks[parts[-1]])
    if dtype == "float32":
        notes.append(
            f"evaluated in float32: singular values below {resolution:.1e} of the largest count as zero, activations "
            f"within {duplicate_rtol:.1e} as the same"
        )
    if training_set is not None:  # Out here, where its items are read as in training.
        try:
            classes = streamed_classes(evaluation.network, training_set, rtol=duplicate_rtol)
            duplicates = _with_training_set(duplicates, classes, evaluation.trace.num_first)
        except Exception as error:  # Whatever a data set raises: the probe has been measured.
            warnings.warn(f"the training set is left out. {type(error).__name__}: {error}", stacklevel=2)
    record = _assembled(evaluation, ranks, null_spaces, duplicates, curvature)
    return replace(
        record, projected=projected, notes=tuple(notes), step=step, measure_seconds=time.perf_counter() - started
    )


def check_measurable(
    module: nn.Module,
    probe: Probe,
    *,
    loss_fn: LossFunction | Literal["behavioral"] | None = None,
    behavior: Behavior | None = None,
    layers: LayerSelection = "all",
    max_outputs: int | Literal["auto"] | None = None,
    num_inputs: int | None = None,
    is_loss_given: bool = True,
    memory_budget: int | None = None,
    dtype: Precision = "float64",
) -> MeasurementPlan:
    """Evaluate once, so that what cannot be measured is known before anything is.

    Args:
        module: See `measure_basin`.
        probe: What there is of it.
        loss_fn: See `measure_basin`.
        behavior: See `measure_basin`.
        layers: See `measure_basin`.
        max_outputs: See `measure_basin`.
        num_inputs: That the probe will have; ``None`` for those that it has.
        is_loss_given: Whether ``loss_fn`` was passed by a person. One that was found on the module by its name must be
            a function of outputs and targets alone: many a method of that name takes inputs and runs the module.
        memory_budget: See `measure_basin`.
        dtype: See `measure_basin`.

    Returns:
        How large a measurement will be.

    Raises:
        TypeError: See `measure_basin`.
        ValueError: See `measure_basin`.
        MemoryBudgetError: See `measure_basin`.
    """
    _check_settings(probe, loss_fn, behavior, "auto", None, 0.0, max_outputs, layers, memory_budget, dtype)
    with evaluated(module, probe, _loss_function(loss_fn), _outputs_of(behavior), dtype=DTYPES[dtype]) as evaluation:
        _selected_parts(evaluation.network.layers, layers)
        if not is_loss_given and evaluation.loss_fn is not None:
            found, outputs, targets = evaluation.loss_fn, evaluation.trace.outputs, evaluation.probe.targets
            run = evaluation.network.layers_run_by(lambda: found(outputs, targets))
            if run:
                raise TypeError(f"loss_fn must compute the loss from outputs and targets, but runs the layers {run}")
        num_inputs = probe.size if num_inputs is None else num_inputs
        num_outputs = _num_directions(num_inputs, evaluation.num_outputs, max_outputs)
        if num_outputs < evaluation.num_outputs:
            _check_projection(behavior)
        _readout(evaluation, behavior)
        _check_num_rows(num_inputs, num_outputs)
        return plan_measurement(
            evaluation.network,
            evaluation.probe,
            evaluation.trace,
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            with_readout=isinstance(behavior, Probabilities) or behavior == "probabilities",
            with_hessian=loss_fn is not None and dtype == "float64",
            memory_budget=memory_budget,
        )


def _check_order(module: Any, inputs: Any, targets: Any) -> None:
    """Refuse arguments in another order, or of another kind, before anything is done with them.

    Raises:
        TypeError: If they are; it says what to pass.
    """
    if isinstance(module, type):
        raise TypeError(f"module must be a torch.nn.Module, got the class {module.__name__}: pass an instance of it")
    if not isinstance(module, nn.Module):
        swapped = ": pass the module first, then the inputs" if isinstance(inputs, nn.Module) else ""
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}{swapped}")
    if isinstance(inputs, DataLoader | Dataset):
        raise TypeError(
            f"inputs must be a batch, got {type(inputs).__name__}: pass the parts of next(iter(loader)) of a loader"
        )
    if callable(targets):
        raise TypeError(f"targets must be data, got {type(targets).__name__}, which can be called: pass loss_fn=...")


def _check_settings(
    probe: Probe,
    loss_fn: LossFunction | Literal["behavioral"] | None,
    behavior: Behavior | None,
    hessian: HessianMode,
    rtol: float | None,
    duplicate_rtol: float,
    max_outputs: int | Literal["auto"] | None,
    layers: LayerSelection,
    memory_budget: int | None,
    dtype: Precision,
) -> None:
    if hessian is not False and hessian not in HESSIAN_MODES:
        raise ValueError(f"hessian must be one of {HESSIAN_MODES} or False, got {hessian!r}")
    if isinstance(loss_fn, str) and loss_fn != "behavioral":
        raise ValueError(f"loss_fn must be a function of outputs and targets or 'behavioral', got {loss_fn!r}")
    if isinstance(behavior, str) and behavior not in ("outputs", "probabilities"):
        raise ValueError(
            f"behavior must be a function of module and inputs, 'outputs' or 'probabilities', got {behavior!r}"
        )
    check_rtol(rtol)
    check_precision(dtype, hessian, rtol)
    _check_types(duplicate_rtol, max_outputs, layers, memory_budget)
    if not 0.0 <= duplicate_rtol < 1.0:
        raise ValueError(f"duplicate_rtol must be inside [0, 1), got {duplicate_rtol}")
    if isinstance(max_outputs, str) and max_outputs != "auto":
        raise ValueError(f"max_outputs must be a number, 'auto' or None, got {max_outputs!r}")
    if isinstance(max_outputs, int) and max_outputs < 1:
        raise ValueError(f"max_outputs must be at least 1, got {max_outputs}")
    if callable(loss_fn) and probe.targets is None:
        is_pair = isinstance(probe.inputs, tuple | list) and len(probe.inputs) == 2  # noqa: PLR2004
        raise ValueError(
            f"a loss_fn needs targets to compare the outputs with, got none: pass targets, or no loss_fn"
            f"{'; inputs is a pair: if it is one of inputs and targets, pass these apart' if is_pair else ''}"
        )


def check_precision(dtype: Precision, hessian: HessianMode, rtol: float | None) -> None:
    """Refuse what cannot be told in a floating point type.

    Raises:
        ValueError: If ``dtype`` is not one that networks are evaluated in, or too coarse for what is asked.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}")
    if dtype == "float64":
        return
    if hessian not in ("auto", False):
        raise ValueError(
            f"hessian must be 'auto' or False with dtype='float32', whose second derivatives do not resolve a null "
            f"space, got {hessian!r}"
        )
    epsilon = torch.finfo(torch.float32).eps
    if rtol is not None and rtol < epsilon:
        raise ValueError(
            f"rtol must be at least {epsilon:.1e} with dtype='float32', whose rounding that is, got {rtol}"
        )


def _check_types(duplicate_rtol: Any, max_outputs: Any, layers: Any, memory_budget: Any) -> None:
    if not _is_number(duplicate_rtol, float):
        raise TypeError(f"duplicate_rtol must be a number, got {duplicate_rtol!r}")
    if not isinstance(max_outputs, str | None) and not _is_number(max_outputs, int):
        raise TypeError(f"max_outputs must be an integer, 'auto' or None, got {max_outputs!r}")
    if not isinstance(layers, Sequence) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"layers must be 'auto', 'all' or a list of names of layers, got {layers!r}")
    check_memory_budget(memory_budget)


def check_memory_budget(memory_budget: Any) -> None:
    """Refuse what is no number of bytes.

    Raises:
        TypeError: If that is so.
    """
    if memory_budget is not None and not _is_number(memory_budget, float):
        raise TypeError(f"memory_budget must be a number of bytes or None, got {memory_budget!r}")


def _is_number(value: Any, kind: type) -> bool:
    """Whether a value is an integer, or any real number where ``kind`` is ``float``; truth is no number."""
    return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)


_NOISE_MARGIN = 32  # of what three evaluations show of the rounding of an output

Planner = Callable[[Network, Probe, Trace], MeasurementPlan]
"""From a network, some inputs and their trace to how all inputs are measured."""


def _loss_function(loss_fn: LossFunction | Literal["behavioral"] | None) -> LossFunction | None:
    return _behavioral_loss if isinstance(loss_fn, str) else loss_fn


def _behavioral_loss(outputs: Tensor, _: Any) -> Tensor:
    """Squared distance from the outputs as they are (Bushnaq et al., 2024): zero, with the Hessian 2 GᵀG."""
    return _squared_distance(outputs, outputs.detach())


def _squared_distance(outputs: Tensor, others: Tensor) -> Tensor:
    return (outputs - others).square().sum()


def _raised(loss_fn: LossFunction | None, dtype: torch.dtype) -> LossFunction | None:
    """A loss of the user in the precision of the evaluation; the behavioral one has it by itself."""
    if loss_fn is None or loss_fn is _behavioral_loss:
        return loss_fn

    def raised(outputs: Tensor, targets: Any) -> Tensor:
        with RaisedPrecision(dtype):
            return loss_fn(outputs, targets)

    return raised


def _outputs_of(behavior: Behavior | None) -> ModuleBehavior | None:
    """What gives the module's outputs, which the loss takes; ``None`` calls the module."""
    if isinstance(behavior, Probabilities):
        return behavior.outputs
    return None if isinstance(behavior, str) else behavior


def _readout(evaluation: "Evaluation", behavior: Behavior | None) -> Tensor | None:
    """Derivative of the behavior by the outputs, as blocks for `weighted_rows`; ``None`` where they are the same."""
    if not isinstance(behavior, Probabilities) and behavior != "probabilities":
        return None
    shape = evaluation.trace.outputs.shape
    if len(shape) == 1 or shape[1] < 2:  # noqa: PLR2004 - classes
        raise ValueError(
            f"behavior='probabilities' needs outputs with at least two classes along their second axis, got shape "
            f"{tuple(shape)}: pass behavior=lambda module, inputs: ... that returns the probabilities"
        )
    return softmax_jacobian(evaluation.trace.outputs.to(torch.float64))


def _check_projection(behavior: Behavior | None) -> None:
    if isinstance(behavior, Probabilities) or behavior == "probabilities":
        raise ValueError(
            f"behavior='probabilities' needs all outputs, of which at most {MAX_ROWS} can be measured at once, and "
            f"cannot be combined with max_outputs: take a smaller probe"
        )


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
        """Numbers of gradients, or their factors, that may be held at once."""
        return GROUP_ELEMENTS if self.plan is None else self.plan.group_elements

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
def evaluated(
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
    device = _device(module)
    with isolated_evaluation(device, dtype), at_rest(module):
        probe = probe.to(device, dtype)
        try:
            network, few, loss_fn, note = _evaluable(module, loss_fn, behavior, probe, dtype, gradient_dtype)
        except ValueError as error:
            if dtype == torch.float64 and needs_float32(error):
                _check_float32_helps(module, behavior, probe, error)
            raise
        plan = None if planned is None else planned(network, *few)
        del few  # And its graph.
        traced = TracedProbe(network, probe, chunk_size=None if plan is None else plan.chunk_size)
        trace = traced.whole
        _check_outputs(probe, trace.outputs)
        layout = _checked_layout(network, probe, trace, is_wanted=with_layout)
        _check_copy(module, trace.outputs, "behavior")
        loss = None
        if loss_fn is not None:
            # Without a graph of all inputs, whether the loss depends on the outputs must still be seen.
            outputs = trace.outputs if traced.is_whole else trace.outputs.detach().requires_grad_()
            loss = _checked_loss(loss_fn, outputs, probe.targets)
            _check_copy(module, loss, "loss_fn")
        yield Evaluation(traced, loss_fn, loss, layout, plan, () if note is None else (note,))


def _check_float32_helps(module: nn.Module, behavior: ModuleBehavior | None, probe: Probe, refused: ValueError) -> None:
    """Where an operation knows float32 only, say what float32 is refused for, if it does not help."""
    replica, behavior = replicas(module, behavior, dtype=torch.float32)
    network, probe = Network(replica, behavior, dtype=torch.float32), probe.to(_device(module), torch.float32)
    try:
        with torch.no_grad():
            before = network.outputs(probe)
            network.outputs(probe.select(range(max(1, probe.size // 2))))  # A state may follow what it has seen.
            if not torch.equal(network.outputs(probe), before):
                raise ValueError("two evaluations differ, as the module keeps a state that changes")
    except (TypeError, ValueError) as error:
        raise ValueError(f"neither float64 nor float32 runs {type(module).__name__}: {error}") from refused


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
    _check_copy(module, few[1].outputs, "behavior")
    trained = as_trained(module, loss_fn, behavior, network, probe, few[1].outputs)
    if trained is None:
        return network, few, _raised(copied_loss, dtype), None
    network = Network(trained.module, trained.behavior, dtype=dtype, gradient_dtype=gradient_dtype)
    settle_embeddings(trained.module, lambda: network.outputs(probe))
    return network, _few_traced(network, probe), _raised(trained.loss_fn, dtype), trained.note


def _device(module: nn.Module) -> torch.device:
    return float64_device(next((parameter.device for parameter in module.parameters()), torch.device("cpu")))


def _few_traced(network: Network, probe: Probe) -> tuple[Probe, Trace]:
    """The first inputs, whose run shows how large that of all will be."""
    few = probe.select(range(min(_FEW, probe.size)))
    try:
        return few, network.trace(few)
    except (TypeError, ValueError):  # Some modules cannot run so few.
        return probe, network.trace(probe)


def _check_outputs(probe: Probe, outputs: Tensor) -> None:
    if outputs.numel() == 0:
        raise ValueError(f"the outputs must hold at least one number per input, got shape {tuple(outputs.shape)}")
    if not bool(outputs.isfinite().all()):
        count = int((~outputs.isfinite()).reshape(probe.size, -1).any(1).sum())
        raise ValueError(f"outputs must be finite, but are NaN or infinite on {count} of the {probe.size} inputs")


def _checked_layout(network: Network, probe: Probe, trace: Trace, *, is_wanted: bool) -> InputLayout | None:
    """Where the inputs are in what was traced, seen from other batches; these must have the same outputs."""
    others = passed_otherwise(network, probe, with_layers=is_wanted)
    _check_independence(network, probe, trace.outputs.detach(), others)
    return input_layout(network, probe, trace, others) if is_wanted else None


def _check_independence(
    network: Network, probe: Probe, outputs: Tensor, others: Sequence[tuple[Tensor, Trace]]
) -> None:
    """Refuse outputs that depend on anything but their own input, as far as other batches show it."""
    tolerance = agreement_rtol(network.dtype) * float(outputs.abs().max())
    deviations = torch.zeros_like(outputs)
    found = [(indices, trace.outputs) for indices, trace in others]
    if any(part.shape[1:] != outputs.shape[1:] for _, part in found):  # Then batches of as many inputs must tell.
        *_, batches = other_batches(probe.size)
        with torch.no_grad():
            found = [(indices, network.outputs(probe.select(indices))) for indices in batches]
    for indices, part in found:
        if part.shape[1:] != outputs.shape[1:]:
            raise ValueError(
                f"each output must depend on its own input only, but with other inputs beside it the shape of an "
                f"output changes from {tuple(outputs.shape[1:])} to {tuple(part.shape[1:])}"
            )
        deviations[indices] = (part - outputs[indices]).abs().maximum(deviations[indices])
    if not bool((deviations <= tolerance).all()):
        _refuse_dependence(network, probe, outputs, deviations)


def _refuse_dependence(network: Network, probe: Probe, outputs: Tensor, deviations: Tensor) -> None:
    """Say what outputs depend on beside their own input, unless it is rounding that moves them."""
    tolerance = agreement_rtol(network.dtype) * float(outputs.abs().max())
    with torch.no_grad():
        again = network.outputs(probe)
    if not bool(((again - outputs).abs() <= tolerance).all()):
        raise ValueError(
            "outputs must be a function of the inputs, but two evaluations differ: the module draws random numbers in "
            "evaluation mode, or keeps a state that changes; pass a behavior that does not"
        )
    with torch.no_grad():
        noise = rounding_noise(lambda: [network.outputs(probe)], network.dtype)[0]
    # Of a single output three evaluations may show too little: then the others' tell.
    limits = (_NOISE_MARGIN * noise.maximum(noise.mean())).clamp(min=tolerance)
    index = int((deviations - limits).reshape(probe.size, -1).amax(1).argmax())
    if bool((deviations <= limits).all()):
        return
    raise ValueError(
        f"each output must depend on its own input only, but the output on input {index} changes with the other "
        f"inputs of the batch: the rank is then not defined input by input"
    )


def _check_copy(module: nn.Module, result: Tensor, name: str) -> None:
    """What finds the user's module where no copy leads would be evaluated on other parameters than the copy's."""
    originals = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not originals or not result.requires_grad:
        return
    used = torch.autograd.grad(result.sum(), originals, retain_graph=True, allow_unused=True)
    if any(gradient is not None for gradient in used):
        raise ValueError(
            f"a copy of the module is measured, but its parameters themselves are used: the module, or the {name}, "
            f"finds them in a global variable or through the trainer; use the module that is passed in"
        )


def _num_directions(num_inputs: int, num_outputs: int, max_outputs: int | str | None) -> int:
    """Along how many directions the outputs of an input are seen; all of them where none are projected away."""
    if isinstance(max_outputs, int):
        return min(max_outputs, num_outputs)
    if max_outputs == "auto" and num_inputs * num_outputs > MAX_ROWS:
        return max(1, AUTO_ROWS // num_inputs)
    return num_outputs


def _check_num_rows(num_inputs: int, num_outputs: int) -> None:
    if num_inputs * num_outputs > MAX_ROWS:
        raise ValueError(
            f"at most {MAX_ROWS} outputs can be measured at once, got {num_inputs} inputs x {num_outputs} outputs: "
            f"take a smaller probe, or pass max_outputs"
        )


def _checked_loss(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    try:
        loss = _loss_of_equal_shapes(loss_fn, outputs, targets)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise TypeError(
            f"loss_fn must take the outputs, shape {tuple(outputs.shape)}, and the targets of the probe, but failed "
            f"with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn must return one floating point number as a tensor, got {got}")
    if not bool(loss.isfinite().all()):
        raise ValueError(f"the loss on the probe must be finite, got {loss.item()}")
    if outputs.requires_grad and not loss.requires_grad:
        raise ValueError(
            f"the loss must be a differentiable function of the outputs, got the constant {loss.item()}: loss_fn may "
            f"neither ignore the outputs nor detach them"
        )
    if loss_fn(outputs, targets).item() != loss.item():
        raise ValueError(
            "the loss must be a function of outputs and targets, but two evaluations differ: loss_fn draws random "
            "numbers, or changes with every call"
        )
    return loss.reshape(())


def _loss_of_equal_shapes(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    """The loss; torch's own losses only warn where targets of another shape are compared with every output."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")
        try:
            return loss_fn(outputs, targets)
        except UserWarning as warning:
            shapes = [tuple(tensor.shape) for tensor in tensors_of(targets)]
            raise TypeError(f"targets must have the shape of the outputs, got {shapes}. {warning}") from warning


def _selected_parts(layers: Sequence[Layer], selection: LayerSelection) -> tuple[Part, ...]:
    by_name = {layer.name: layer for layer in layers}
    if isinstance(selection, str) and selection not in ("auto", "all"):
        raise ValueError(f"layers must be 'auto', 'all' or a list of names of layers, got {selection!r}")
    names = list(by_name) if isinstance(selection, str) else list(selection)
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"layers must be among {[*map(escaped, by_name)]}, got {[*map(escaped, unknown)]}")
    if len(set(names)) < len(names):
        raise ValueError(f"layers must be named once each, got {[*map(escaped, names)]}")
    parts = [Part("layer", name, (by_name[name],)) for name in names]
    if selection == "auto":
        for block, members in layer_blocks(names).items():
            parts.append(Part("block", block, tuple(by_name[name] for name in members)))
    return (*parts, Part("network", "", tuple(layers)))


def _measured_gradients(
    evaluation: Evaluation,
    parts: Sequence[Part],
    rtol: float | None,
    generator: Generator,
    readout: Tensor | None,
    curvature: HessianMeasurement[Part] | None,
    *,
    spectrum: bool,
    notes: list[str],
) -> tuple[dict[Part, GradientRank], dict[Part, Spectrum]]:
    """Ranks of the behavioral gradients of each part; and singular values, unless neither they nor these are wanted."""
    max_elements = evaluation.max_elements
    check = AutogradCheck(evaluation.traced, generator)
    measurement = RankMeasurement(
        parts,
        evaluation.traced,
        check,
        rtol=rtol,
        generator=generator,
        max_waiting=max_elements // 2,
        needs_spectra=spectrum or curvature is not None,
        is_plain=readout is None,
    )
    measurement.try_last_layers(max_elements=max_elements)
    if measurement.is_complete:
        return measurement.finished()
    for measured in layer_gradients(evaluation.traced, check, max_elements=max_elements):
        gradients = measured.gradients if readout is None else measured.gradients.weighted(readout)
        measurement.add(measured.layer, gradients)
        if curvature is not None:
            curvature.add(measured.layer, measured.gradients)
        if measured.note is not None:
            notes.append(measured.note)
    return measurement.finished()


def _curvature(
    evaluation: Evaluation,
    parts: Sequence[Part],
    hessian: HessianMode,
    rtol: float | None,
    seed: int,
    *,
    is_plain: bool,
    notes: list[str],
) -> HessianMeasurement[Part] | None:
    """What will measure the Hessian; ``None`` where there is nothing to look at."""
    if evaluation.loss_fn is None or hessian is False:
        return None
    if evaluation.network.dtype != torch.float64:
        notes.append("the Hessian is left out: its null space is not resolved by second derivatives in float32")
        return None
    if evaluation.rows.shape[1] < evaluation.trace.outputs[0].numel():
        notes.append("the Hessian is left out: its Gauss-Newton part needs all outputs")
        return None
    loss_fn, targets = evaluation.loss_fn, evaluation.probe.targets
    if loss_fn is _behavioral_loss:  # As a function of the outputs it is zero, but its gradient shall change with them.
        loss_fn, targets = _squared_distance, evaluation.trace.outputs.detach()
    try:
        measurement = HessianMeasurement(
            evaluation.traced,
            lambda outputs: loss_fn(outputs, targets),
            {part: part.layers for part in parts},
            mode=hessian,
            rtol=rtol,
            generator=Generator().manual_seed(seed),
            is_plain=is_plain,
            limits=None if evaluation.plan is None else evaluation.plan.hessian_limits,
        )
    except (RuntimeError, ArithmeticError, ValueError) as error:  # Not every loss can be differentiated twice.
        _leave_out_hessian(error, notes)
        return None
    notes.extend(measurement.notes)
    return measurement


def _leave_out_hessian(error: Exception, notes: list[str]) -> None:
    notes.append(f"the Hessian is left out: {error}")
    warnings.warn(f"the Hessian is left out. {type(error).__name__}: {error}", stacklevel=4)


def _measured_hessian(
    curvature: HessianMeasurement[Part] | None, spectra: Mapping[Part, Spectrum], notes: list[str]
) -> dict[Part, NullSpace]:
    """Null spaces of the diagonal block of each part; empty where there is no Hessian to look at."""
    if curvature is None:
        return {}
    try:
        return curvature.null_spaces(spectra)
    except (RuntimeError, ArithmeticError, ValueError) as error:  # Not every operation can be differentiated twice.
        _leave_out_hessian(error, notes)
        return {}


@dataclass(frozen=True, eq=False)
class _Duplicates:
    """Numbers of duplicated activations and dead units, by layer and of the network, and the inputs that merged."""

    layers: Mapping[str, Mapping[str, Any]]
    network: Mapping[str, Any]
    rank_bound: int | None


def _measured_duplicates(evaluation: Evaluation, rtol: float, rank: GradientRank) -> _Duplicates:
    network, probe, trace = evaluation.network, evaluation.probe, evaluation.trace
    activations = layer_activations(network, probe, trace, evaluation.layout)
    classes: dict[str | None, Tensor] = {
        name: found for name, layer in activations.items() if (found := layer.classes(rtol)) is not None
    }
    layers = {name: _layer_duplicates(layer, classes.get(name), rtol) for name, layer in activations.items()}
    after_first = [layers[name] for name in list(activations)[trace.num_first :]]
    outputs = trace.outputs.detach().reshape(probe.size, -1)
    output_classes = duplicate_classes(outputs, rtol=rtol)
    totals: dict[str, Any] = {
        quantity: max((layer[quantity] for layer in after_first if quantity in layer), default=0)
        for quantity in ("duplicated_activations", "duplicated_activations_exact")
    }
    totals |= {
        "dead_units": sum(layer.get("dead_units", 0) for layer in layers.values()),
        "output_duplicated_activations": probe.size - _num_classes(output_classes),
        "output_duplicated_activations_exact": duplicated_activations(outputs, rtol=0.0),
        "merged_inputs": _merged_inputs(classes | {None: output_classes}),
    }
    return _Duplicates(layers=layers, network=totals, rank_bound=_rank_bound(evaluation, activations, rank))


def _merged_inputs(classes: Mapping[str | None, Tensor]) -> tuple[MergedInput, ...]:
    """Each input that is not the first of its class, at the first layer where it is not."""
    merged: dict[int, MergedInput] = {}
    for layer, first in classes.items():
        for index in (first != torch.arange(first.numel())).nonzero().squeeze(1).tolist():
            merged.setdefault(index, MergedInput(index, int(first[index]), layer))
    return tuple(merged[index] for index in sorted(merged))


def _with_training_set(duplicates: _Duplicates, classes: Mapping[str | None, Tensor], num_first: int) -> _Duplicates:
    """What was counted on the probe, and the same over the whole training set beside it."""
    counts = {name: first.numel() - _num_classes(first) for name, first in classes.items()}
    first_layers = list(duplicates.layers)[:num_first]
    later = [count for name, count in counts.items() if name is not None and name not in first_layers]
    layers = {
        name: {**counted, "train_duplicated_activations": counts[name]} if name in counts else counted
        for name, counted in duplicates.layers.items()
    }
    totals = {
        "train_duplicated_activations": max(later, default=0),
        "train_num_inputs": classes[None].numel(),
        "train_output_duplicated_activations": counts[None],
        "train_merged_inputs": _merged_inputs(classes),
    }
    return replace(duplicates, layers=layers, network={**duplicates.network, **totals})


def _rank_bound(evaluation: Evaluation, activations: dict[str, LayerActivations], rank: GradientRank) -> int | None:
    """The tightest bound over nested cuts; layers are looked at until it is the rank, those with fewest classes first.

    Args:
        evaluation: Of the probe.
        activations: Of the probe.
        rank: Of the network: the gradients of merged inputs may differ by less than decides it.
    """
    probe, num_outputs = evaluation.probe, evaluation.num_outputs
    # What all inputs share is the same for all.
    shared = torch.zeros(probe.size, dtype=torch.int64)
    candidates: list[tuple[str, Tensor]] = []
    for name, layer in activations.items():
        classes = layer.classes(rank.rtol)
        candidates.append((name, shared if classes is None else classes))
        # Where these are not the same enough, those that are equal may be.
        if classes is not None and _num_classes(classes) < probe.size:
            exact = layer.classes(0.0)
            if exact is not None and not torch.equal(exact, classes):
                candidates.append((name, exact))
    num_parameters = sum(layer.num_parameters for layer in evaluation.network.layers)
    bound = gradient_rank_bound(num_parameters, num_outputs, [(0, probe.size)])
    if rank.rank == bound:  # And none is below the rank.
        return bound
    every = torch.arange(probe.size)
    cuts: dict[int, list[_Cut]] = {}
    # Errors of all cuts that are used add up: each has its part of the tolerance.
    share = 1.0 / max(1, len(candidates))
    merging = [place for place, (_, classes) in enumerate(candidates) if _num_classes(classes) < probe.size]
    for place in sorted(merging, key=lambda place: _num_classes(candidates[place][1])):
        name, classes = candidates[place]
        cuts[place] = _cuts_at(evaluation, activations, name, classes, rank, share)
        for classes, directions in cuts[place]:
            bound = gradient_rank_bound(bound, num_outputs, [(directions(every), _num_classes(classes))])
        in_order = [cut for _, found in sorted(cuts.items()) for cut in found]
        bound = min(bound, nested_rank_bound(probe.size, num_outputs, in_order))
        if rank.rank == bound:
            break
    return bound


_Cut = tuple[Tensor, DirectionsOfMerged]


def _cuts_at(
    evaluation: Evaluation,
    activations: dict[str, LayerActivations],
    name: str,
    classes: Tensor,
    rank: GradientRank,
    share: float,
) -> list[_Cut]:
    """Classes of inputs that are merged where a layer begins, and how much rank lies before it inside of them.

    Args:
        evaluation: Of the probe.
        activations: Of the probe.
        name: Of the layer.
        classes: First member of each input's class, by what enters the layer.
        rank: Of the network.
        share: Fraction of the tolerance of the rank that merging these inputs may use up.

    Returns:
        None where more than what enters the layer crosses it; else one or two.
    """
    network, traced = evaluation.network, evaluation.traced
    used = [False] * len(network.parameters())
    for chunk in traced.chunks():
        used = list(map(or_, used, parameters_before(network, chunk.trace, name)))
    # Half of the tolerance is for B4, and as much again for what three combinations may miss.
    tolerance = share * rank.rtol * rank.largest / 4
    if merging_error(traced, classes, used) > tolerance:
        return []
    parameters = zip(network.parameters(), used, strict=True)
    num_before = sum(parameter.numel() for parameter, is_used in parameters if is_used)
    cuts: list[_Cut] = [(classes, lambda _: num_before)]
    passages: list[Passage | None] = []
    for chunk in traced.chunks():
        few = activations if traced.is_whole else layer_activations(network, chunk.probe, chunk.trace)
        passages.append(passage(network, chunk.probe, chunk.trace, few, name))
    through = joined_passages(passages)
    if through is not None:
        # What the tighter bounds ask of a class: the same signals before the cut as well.
        alike = duplicate_classes(through.signals.flatten(1), rtol=rank.rtol)
        classes = duplicate_classes(torch.stack([classes, alike], dim=1), rtol=0.0)
        if merging_error(traced, classes, used, through) <= tolerance:
            cuts.append((classes, partial(_directions_through, classes, through, num_before, rank, share)))
    return cuts


def _directions_through(
    classes: Tensor, through: Passage, num_before: int, rank: GradientRank, share: float, kept: Tensor
) -> int:
    """Bounds B2, B3 and B4 for some of the inputs."""
    signals = through.signals[kept.to(through.signals.device)]
    members = duplicate_classes(classes[kept].unsqueeze(1), rtol=0.0)
    directions = min(num_before, merged_directions(members, signals))
    if through.inputs is None or directions == 0:
        return directions
    inputs = through.inputs[kept.to(through.inputs.device)]
    # B4 takes its tolerance from the largest row; probabilities have smaller gradients than the outputs.
    largest_row = float((signals.norm(dim=2).amax(1) * inputs.norm(dim=1)).max())
    rtol = share * rank.rtol * (min(1.0, rank.largest / largest_row) if largest_row > 0.0 else 1.0)
    return min(directions, merged_linear_directions(members, signals, inputs, rtol=rtol))


def _num_classes(classes: Tensor) -> int:
    return len(set(classes.tolist()))


def _layer_duplicates(layer: LayerActivations, classes: Tensor | None, rtol: float) -> dict[str, int]:
    counted = {}
    exact = layer.classes(0.0)
    if classes is not None and exact is not None:
        counted["duplicated_activations"] = classes.numel() - _num_classes(classes)
        counted["duplicated_activations_exact"] = exact.numel() - _num_classes(exact)
    if layer.leaving is not None:
        counted["dead_units"] = dead_units(layer.leaving, rtol=rtol)
    return counted


def _assembled(
    evaluation: Evaluation,
    ranks: Mapping[Part, GradientRank],
    null_spaces: Mapping[Part, NullSpace],
    duplicates: _Duplicates,
    curvature: HessianMeasurement[Part] | None,
) -> BasinRecord:
    def quantities(part: Part) -> dict[str, Any]:
        rank, null_space = ranks[part], null_spaces.get(part)
        found: dict[str, Any] = {
            "num_parameters": part.num_parameters,
            "num_rows": evaluation.num_rows,
            "gradient_rank": rank.rank,
            "gradient_rank_gap": rank.gap,
            "gradient_rank_at": rank.at,
            "gradient_effective_rank": rank.effective_rank,
            "gradient_rtol": rank.rtol,
            "gradient_method": rank.method,
        }
        if null_space is not None and curvature is not None:
            found |= {
                "hessian_nullity": null_space.nullity,
                "hessian_nullity_lower": null_space.lower,
                "hessian_nullity_upper": null_space.upper,
                "hessian_nullity_strict": null_space.strict,
                "hessian_negative": null_space.negative,
                "hessian_largest": null_space.largest,
                "residual_curvature": null_space.residual_curvature,
                "smallest_curvature": null_space.smallest_curvature,
                "gauss_newton_nullity": null_space.gauss_newton_nullity,
                "hessian_resolving_loss": curvature.resolving_loss(null_space),
                "hessian_rtol": null_space.rtol,
                "hessian_method": null_space.method,
            }
        return found

    layers, blocks = {}, {}
    for part in ranks:
        if part.kind == "layer":
            layers[part.name] = LayerRecord(**quantities(part), **duplicates.layers.get(part.name, {}))
        elif part.kind == "block":
            members = [duplicates.layers.get(layer.name, {}) for layer in part.layers]
            blocks[part.name] = LayerRecord(**quantities(part), **_block_duplicates(members))
    (network,) = (part for part in ranks if part.kind == "network")
    order = [layer.name for layer in evaluation.network.layers]
    return BasinRecord(
        **quantities(network),
        **duplicates.network,
        num_inputs=evaluation.probe.size,
        loss=_reported_loss(evaluation),
        gradient_rank_bound=duplicates.rank_bound,
        layers={name: layers[name] for name in order if name in layers},
        blocks=blocks,
    )


def _reported_loss(evaluation: Evaluation) -> float | None:
    # The behavioral loss is zero by what it is: no sign of a fit.
    if evaluation.loss is None or evaluation.loss_fn is _behavioral_loss:
        return None
    return float(evaluation.loss.detach())


def _block_duplicates(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a block: the largest number of duplicates over its layers, and all its dead units."""
    found = {}
    for quantity, combine in (
        ("duplicated_activations", max),
        ("duplicated_activations_exact", max),
        ("train_duplicated_activations", max),
        ("dead_units", sum),
    ):
        values = [member[quantity] for member in members if quantity in member]
        if values:
            found[quantity] = combine(values)
    return found
