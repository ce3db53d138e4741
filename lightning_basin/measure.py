"""One measurement: a module and a probe in, a record out."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, nn

from lightning_basin.evaluation import Evaluation, behavioral_loss, loss_function, open_evaluation, outputs_of
from lightning_basin.functional.null_space import NullSpace
from lightning_basin.functional.rank import GradientRank
from lightning_basin.limits import MAX_DENSE_PARAMETERS
from lightning_basin.memory import MeasurementPlan, plan_measurement
from lightning_basin.network.network import LossFunction, Network
from lightning_basin.network.rounding import rounding_rtol
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe
from lightning_basin.quantities.duplicates import (
    DuplicateCounts,
    block_duplicates,
    measure_duplicates,
    with_training_set,
)
from lightning_basin.quantities.hessian import HessianMeasurement, hessian_measurement, measure_null_spaces
from lightning_basin.quantities.ranks import (
    behavior_jacobian,
    check_num_rows,
    check_projection,
    measure_ranks,
    num_directions_of,
)
from lightning_basin.quantities.scopes import Scope, select_scopes
from lightning_basin.quantities.training_set import streamed_classes
from lightning_basin.record import BasinRecord, LayerRecord
from lightning_basin.settings import (
    DTYPES,
    Behavior,
    HessianMode,
    LayerSelection,
    Precision,
    Probabilities,
    check_order,
    check_settings,
    is_number,
)
from lightning_basin.training_set import as_probes


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
            free. Inputs are then measured in chunks, and layers one after the other, where that is needed.
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
    check_order(module, inputs, targets)
    probe = inputs if isinstance(inputs, Probe) else Probe(inputs, targets)
    check_settings(probe, loss_fn, behavior, hessian, rtol, duplicate_rtol, max_outputs, layers, memory_budget, dtype)
    if not is_number(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if dtype == "float32":
        duplicate_rtol = max(duplicate_rtol, rounding_rtol(torch.float32))
    training_set = None if duplicates_over is None else as_probes(duplicates_over)
    generator = Generator().manual_seed(seed)
    has_hessian = loss_fn is not None and hessian is not False and dtype == "float64"

    def planned(network: Network, few: Probe, trace: Trace) -> MeasurementPlan:
        num_outputs = num_directions_of(probe.size, network.rows(trace.outputs).shape[1], max_outputs)
        check_num_rows(probe.size, num_outputs)
        parts = select_scopes(network.layers, layers)
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

    with open_evaluation(
        module,
        probe,
        loss_function(loss_fn),
        outputs_of(behavior),
        planned,
        dtype=DTYPES[dtype],
        with_layout=True,
    ) as evaluation:
        notes = list(evaluation.notes)
        num_directions = num_directions_of(probe.size, evaluation.num_outputs, max_outputs)
        projected = num_directions < evaluation.num_outputs
        if projected:
            notes.append(
                f"ranks are lower bounds: the {evaluation.num_outputs} outputs of each input are seen along "
                f"{num_directions} random orthonormal directions"
            )
            check_projection(behavior)
            evaluation.network.project_outputs(evaluation.num_outputs, num_directions, generator)
        parts = select_scopes(evaluation.network.layers, layers)
        readout = behavior_jacobian(evaluation, behavior)
        curvature = hessian_measurement(evaluation, parts, hessian, rtol, seed, is_plain=readout is None, notes=notes)
        ranks, spectra = measure_ranks(
            evaluation, parts, rtol, generator, readout, curvature, spectrum=spectrum, notes=notes
        )
        null_spaces = measure_null_spaces(curvature, spectra, notes)
        resolution = ranks[parts[-1]].rtol
        duplicates = measure_duplicates(evaluation, duplicate_rtol, ranks[parts[-1]])
    if dtype == "float32":
        notes.append(
            f"evaluated in float32: singular values below {resolution:.1e} of the largest count as zero, activations "
            f"within {duplicate_rtol:.1e} as the same"
        )
    if training_set is not None:  # Out here, where its items are read as in training.
        try:
            classes = streamed_classes(evaluation.network, training_set, rtol=duplicate_rtol)
            duplicates = with_training_set(duplicates, classes, evaluation.trace.num_first)
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
    check_settings(probe, loss_fn, behavior, "auto", None, 0.0, max_outputs, layers, memory_budget, dtype)
    with open_evaluation(
        module, probe, loss_function(loss_fn), outputs_of(behavior), dtype=DTYPES[dtype]
    ) as evaluation:
        select_scopes(evaluation.network.layers, layers)
        if not is_loss_given and evaluation.loss_fn is not None:
            found, outputs, targets = evaluation.loss_fn, evaluation.trace.outputs, evaluation.probe.targets
            run = evaluation.network.layers_run_by(lambda: found(outputs, targets))
            if run:
                raise TypeError(f"loss_fn must compute the loss from outputs and targets, but runs the layers {run}")
        num_inputs = probe.size if num_inputs is None else num_inputs
        num_outputs = num_directions_of(num_inputs, evaluation.num_outputs, max_outputs)
        if num_outputs < evaluation.num_outputs:
            check_projection(behavior)
        behavior_jacobian(evaluation, behavior)
        check_num_rows(num_inputs, num_outputs)
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


def _assembled(
    evaluation: Evaluation,
    ranks: Mapping[Scope, GradientRank],
    null_spaces: Mapping[Scope, NullSpace],
    duplicates: DuplicateCounts,
    curvature: HessianMeasurement[Scope] | None,
) -> BasinRecord:
    def quantities(part: Scope) -> dict[str, Any]:
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
            blocks[part.name] = LayerRecord(**quantities(part), **block_duplicates(members))
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
    if evaluation.loss is None or evaluation.loss_fn is behavioral_loss:
        return None
    return float(evaluation.loss.detach())
