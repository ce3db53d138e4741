"""One measurement: a module and a probe in, a record out."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, nn

from lightning_basin.checks import check_flag, check_number, check_order
from lightning_basin.evaluation import Evaluation, open_evaluation
from lightning_basin.functional.rank import GradientRank
from lightning_basin.memory import MeasurementPlan, plan_measurement
from lightning_basin.network.calls import LossFunction
from lightning_basin.network.network import Network
from lightning_basin.network.replica import device_of
from lightning_basin.network.trace import Trace, layers_run_by
from lightning_basin.probe import Probe
from lightning_basin.quantities.activations import measure_activation_ranks, measure_activations
from lightning_basin.quantities.behavior import behavior_jacobian, project_outputs
from lightning_basin.quantities.duplicates import (
    DuplicateCounts,
    block_duplicates,
    measure_duplicates,
    with_training_set,
)
from lightning_basin.quantities.hessian.measurement import hessian_measurement, measure_null_spaces, null_space_fields
from lightning_basin.quantities.rank_bound import measure_rank_bound
from lightning_basin.quantities.ranks import measure_ranks, rank_fields
from lightning_basin.quantities.scopes import Scope, select_scopes
from lightning_basin.record import BasinRecord, LayerRecord
from lightning_basin.settings import Behavior, DType, HessianMode, LayerSelection, Settings, behavioral_loss
from lightning_basin.stages import StageClock, Watcher, progress_bar
from lightning_basin.structure import Planner, StructureCache
from lightning_basin.training_set import as_probes

NumInputs = int | Callable[[int], int]
"""The number of inputs that a probe will have, or a function that returns it for the number of outputs of an input."""


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
    dtype: DType = "auto",
    seed: int = 0,
    step: int | None = None,
    trained: Collection[str] = (),
    progress: bool | None = None,
) -> BasinRecord:
    """Measure how flat the basin of a network is, and where it loses information.

    The module is copied, evaluated in evaluation mode, in float64 unless ``dtype`` says otherwise, and left as it was;
    so are all random states.

    Args:
        module: The module, of any floating point type, on any device.
        inputs: The k inputs along the first axis of a tensor, or of each tensor in a tuple or dict; or a `Probe`.
        targets: The second argument of ``loss_fn``.
        loss_fn: The loss, from outputs and targets to a scalar. Without it loss and Hessian are not measured.
            ``"behavioral"`` is the squared distance from the outputs as they are: its Hessian is 2 GᵀG at any weights,
            and there is no loss to report.
        behavior: The outputs whose gradients count, shape ``(k, ...)``, as a function of the module and the inputs.
            ``None`` or ``"outputs"`` calls the module, unpacking a tuple or dict as its ``forward`` takes it.
            ``"probabilities"`` takes the softmax of its outputs over the second axis, where torch's cross-entropy has
            the classes, while ``loss_fn`` still gets the outputs before the softmax.
        layers: The layers to report: ``"all"``, ``"auto"`` (blocks beside the layers where these are more than 32), or
            names of layers, or of modules, each of which is a block of the layers in it. Only what these ask for is
            formed and differentiated where the rank can be proved without the others (``spectrum=False``).
        hessian: The way to the Hessian. ``"auto"`` brackets its nullity by 10 to 25 products at any size, and up to 500
            parameters forms it too; ``"dense"`` forms it always, ``"bracket"`` never; ``"gauss-newton"`` takes no
            product and measures ``gauss_newton_nullity`` only; ``False`` measures nothing of it.
        rtol: The relative tolerance of ranks; ``None`` means ``max(shape) * eps`` of the matrix that is decomposed, eps
            of ``dtype``.
        duplicate_rtol: The difference, relative to the largest activation, up to which two activations are the same.
        duplicates_over: A whole training set over which duplicated activations are counted too: a map-style data set
            or a ``DataLoader`` of one (read in the order of its indices, without the loader's workers and shuffling),
            or batches that can be iterated over several times, each a tensor, a pair of inputs and targets, or a
            `Probe`. It is streamed two times or more.
        max_outputs: The number of random orthonormal combinations of outputs whose gradients are measured where a
            module has more outputs per input; ranks are then lower bounds, and the Hessian is left out. ``"auto"``
            combines where there are more than ``MAX_ROWS`` outputs on the probe, ``None`` refuses these.
        spectrum: Whether to compute singular values where the rank can be proved without them, several times as fast.
            Without them effective ranks, log-determinants and most ranks at coarser tolerances are left out.
        memory_budget: The bytes that the measurement may use beside what the process holds; ``None`` means half of what
            is free: on the device, or on the machine and in the container or job (of 4 GiB where the system does not
            tell, as on Windows). Where needed, inputs are measured in chunks, and layers one after the other.
        dtype: The type in which the copy is run and differentiated. ``"auto"`` takes float64, but float32 on an
            accelerator that is slow in float64 or has none, unless ``hessian`` or ``rtol`` ask for more; the record
            says which. ``"float32"`` halves the memory of the graph. Its results are decomposed in float64 all the
            same, but singular values below its rounding count as zero, and a note in the record says where this begins.
            Activations are then the same within 4e-6 at least, and the Hessian is left out.
        seed: The seed of all random vectors: same seed, same numbers.
        step: The number of optimizer steps taken, noted in the record.
        trained: The names of parameters that are known to get a gradient in training. It is an error if the outputs
            depend on them and have no gradient there, as under ``no_grad``.
        progress: Whether to show a progress bar on standard error, with the stage of the measurement and the layers
            that are differentiated. ``None`` shows one on a terminal, where the measurement takes more than a second.

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

        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> record = measure_basin(layer, torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
        >>> record.gradient_rank, record.gradient_rank_deficit, record.gradient_nullity
        (2, 1, 1)
    """
    check_order(module, inputs=inputs, targets=targets, loss_fn=loss_fn, behavior=behavior)
    check_number("step", step, "at least 0", lambda steps: steps >= 0, is_optional=True)
    check_flag("progress", progress, is_optional=True)
    settings = Settings(
        loss_fn=loss_fn,
        behavior=behavior,
        layers=layers,
        hessian=hessian,
        rtol=rtol,
        duplicate_rtol=duplicate_rtol,
        max_outputs=max_outputs,
        spectrum=spectrum,
        memory_budget=memory_budget,
        dtype=dtype,
        seed=seed,
        trained=trained,
    )
    probe = inputs if isinstance(inputs, Probe) else Probe(inputs, targets)
    with progress_bar(progress=progress) as watch:
        taken = None if step is None else int(step)
        return measure(module, probe, settings, duplicates_over=duplicates_over, step=taken, watch=watch)


def measure(
    module: nn.Module,
    probe: Probe,
    settings: Settings,
    *,
    duplicates_over: Any = None,
    step: int | None = None,
    cache: StructureCache | None = None,
    watch: Watcher | None = None,
) -> BasinRecord:
    """Measure the quantities that the settings ask for, as `measure_basin` does."""
    clock, settings = StageClock(watch=watch), settings.on_device(device_of(module, torch.float32))
    settings.check_targets(probe)
    training_set = None if duplicates_over is None else as_probes(duplicates_over)
    generator = Generator().manual_seed(settings.seed)
    make_plan = _planner(settings, probe.size)
    with open_evaluation(module, probe, settings, make_plan, with_layout=True, cache=cache, clock=clock) as evaluation:
        projected = project_outputs(evaluation, generator)
        scopes = select_scopes(evaluation.network.layers, settings.layers)
        with clock("hessian"):
            hessian = hessian_measurement(evaluation, scopes)
        with clock("ranks"):
            ranks, spectra = measure_ranks(evaluation, scopes, hessian, generator)
        with clock("hessian"):
            null_spaces = measure_null_spaces(hessian, spectra, evaluation.notes)
        with clock("duplicates"):
            activations = measure_activations(evaluation)
            activation_ranks = measure_activation_ranks(evaluation, scopes, activations)
            rank = ranks[scopes[-1]]
            duplicates = measure_duplicates(evaluation, activations, also_at=[rank.rtol])
            bound = measure_rank_bound(evaluation, activations, rank)
    if training_set is not None:
        with clock("duplicates"):
            duplicates = with_training_set(duplicates, evaluation, training_set)
    _note_precision(evaluation, rank)
    fields = {
        scope: rank_fields(ranks[scope], spectra.get(scope)) | activation_ranks.get(scope, {}) for scope in scopes
    }
    for scope, null_space in null_spaces.items():
        fields[scope] |= null_space_fields(null_space)
    return _assemble(evaluation, fields, duplicates, gradient_rank_bound=bound, projected=projected, step=step)


def check_measurable(
    module: nn.Module,
    probe: Probe,
    settings: Settings,
    *,
    num_inputs: NumInputs | None = None,
    is_loss_given: bool = True,
) -> MeasurementPlan:
    """Evaluate once, so that a module that cannot be measured is refused before training; return the plan.

    The probe holds the first inputs of ``num_inputs``, a number or a function that returns it for the number of outputs
    of an input; ``None`` means that it has all. A loss that was taken from the module by its name, not given by a
    person, must be a function of outputs and targets alone: methods of such a name often take inputs and run modules.
    """
    settings = settings.on_device(device_of(module, torch.float32))
    settings.check_targets(probe)
    with open_evaluation(module, probe, settings) as evaluation:
        if not is_loss_given and evaluation.loss_fn is not None:
            _check_loss_runs_no_layer(evaluation, evaluation.loss_fn)
        behavior_jacobian(evaluation)
        make_plan = _planner(settings, probe.size if num_inputs is None else num_inputs)
        plan = make_plan(evaluation.network, evaluation.probe, evaluation.trace)
        return replace(plan, unseen=evaluation.unseen)


def _check_loss_runs_no_layer(evaluation: Evaluation, loss_fn: LossFunction) -> None:
    outputs, targets = evaluation.trace.outputs, evaluation.probe.targets
    module, layers = evaluation.network.module, evaluation.network.layers
    names = layers_run_by(module, layers, lambda: loss_fn(outputs, targets))
    if names:
        raise TypeError(f"loss_fn must compute the loss from outputs and targets, but runs the layers {names}")


def _planner(settings: Settings, size: NumInputs) -> Planner:
    def plan(network: Network, sample: Probe, trace: Trace) -> MeasurementPlan:
        scopes = select_scopes(network.layers, settings.layers)
        num_outputs = network.rows(trace.outputs).shape[1]
        num_inputs = size(num_outputs) if callable(size) else size
        return plan_measurement(
            network,
            sample,
            trace,
            num_inputs=num_inputs,
            num_outputs=settings.num_directions(num_inputs, num_outputs),
            num_blocks=sum(scope.kind == "block" for scope in scopes),
            with_readout=settings.counts_probabilities,
            hessian=settings.planned_hessian,
            memory_budget=settings.memory_budget,
        )

    return plan


def _note_precision(evaluation: Evaluation, rank: GradientRank) -> None:
    settings = evaluation.settings
    if settings.precision == "float64":
        return
    evaluation.notes.append(
        f"evaluated in float32: singular values below {rank.rtol:.1e} of the largest count as zero, activations "
        f"within {settings.resolved_duplicate_rtol:.1e} as the same"
    )
    if settings.dtype == "auto":
        evaluation.notes.append(
            "dtype='auto' took float32, as float64 is slow on this device or missing: pass dtype='float64' to measure "
            "the Hessian too"
        )


def _assemble(
    evaluation: Evaluation,
    fields: Mapping[Scope, Mapping[str, Any]],
    duplicates: DuplicateCounts,
    **network_fields: Any,
) -> BasinRecord:
    """Put the record together from the fields of each scope."""
    records: dict[Scope, LayerRecord] = {}
    for scope in list(fields)[:-1]:
        members = [duplicates.layers.get(layer.name, {}) for layer in scope.layers]
        counts = members[0] if scope.kind == "layer" else block_duplicates(members)
        records[scope] = LayerRecord(
            num_parameters=scope.num_parameters, num_rows=evaluation.num_rows, **fields[scope], **counts
        )
    *_, network = fields
    layers = {scope.name: record for scope, record in records.items() if scope.kind == "layer"}
    order = [layer.name for layer in evaluation.network.layers]
    # The behavioral loss is always zero: no sign of a fit.
    loss = None if evaluation.loss_fn is behavioral_loss else evaluation.loss
    seconds = evaluation.clock.seconds()
    return BasinRecord(
        num_parameters=network.num_parameters,
        num_rows=evaluation.num_rows,
        num_inputs=evaluation.probe.size,
        dtype=evaluation.settings.precision,
        loss=None if loss is None else float(loss.detach()),
        layers={name: layers[name] for name in order if name in layers},
        blocks={scope.name: record for scope, record in records.items() if scope.kind == "block"},
        notes=tuple(evaluation.notes),
        measure_seconds=sum(seconds.values()),
        seconds=seconds,
        **fields[network],
        **duplicates.network,
        **network_fields,
    )
