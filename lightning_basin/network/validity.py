"""Checks, before anything is measured, that outputs and loss are functions of each input."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.naming import escaped
from lightning_basin.network.calls import LossFunction
from lightning_basin.network.network import Network
from lightning_basin.network.remedies import cause, is_out_of_memory
from lightning_basin.network.replica import check_computed
from lightning_basin.network.rounding import agreement_rtol, in_other_precision
from lightning_basin.network.runs import outputs_of_full_chunks
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe
from lightning_basin.tensors import as_result, dense_form, described, tensors_of

_NOISE_MARGIN = 32
"""Factor between the rounding seen in one evaluation in another precision, and the largest rounding of an output."""

_SHOWN = 5
"""Largest number of items that a message lists."""


def check_outputs(network: Network, probe: Probe, trace: Trace) -> None:
    """Refuse outputs that are empty or not finite, and say where they began to be."""
    outputs = trace.outputs
    if outputs.numel() == 0:
        raise ValueError(f"the outputs must hold at least one number per input, got shape {tuple(outputs.shape)}")
    rows = _rows_not_finite(outputs)
    if rows:
        raise ValueError(
            f"outputs must be finite, but are NaN or infinite on {len(rows)} of the {probe.size} inputs, the first of "
            f"them input {rows[0]}{_origin_of_not_finite(network, probe, trace)}"
        )


def _origin_of_not_finite(network: Network, probe: Probe, trace: Trace) -> str:
    """Say where NaN or infinity come from, and what helps."""
    named = (*network.named_parameters.items(), *network.module.named_buffers())
    dense = [(name, tensor) for name, tensor in named if tensor.is_floating_point() and dense_form(tensor) is None]
    names = [escaped(name) for name, tensor in dense if not bool(tensor.isfinite().all())]
    if names:
        return f": {_listed(names)} of the module are not finite, most often after a step that diverged"
    for tensor in tensors_of(probe.inputs):
        if rows := _rows_not_finite(tensor):
            return f": leave out the inputs {_listed(rows)}, which are not finite themselves"
    for name, tensors in trace.leaving.items():
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            return f": layer {escaped(name)!r} is the first whose results are not finite, of finite inputs and weights"
    return ": what follows the layers makes them of finite numbers"


def _rows_not_finite(tensor: Tensor) -> list[int]:
    """Return the rows of a tensor that hold NaN or infinity."""
    return (~tensor.detach().isfinite()).unsqueeze(1).flatten(1).any(1).nonzero().flatten().tolist()


def _listed(items: Sequence[Any]) -> str:
    """List the first items, and say whether there are more."""
    return f"{[*items[:_SHOWN]]}" + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def check_independence(
    network: Network, probe: Probe, outputs: Tensor, regrouped: Sequence[tuple[Tensor, Trace]]
) -> None:
    """Refuse outputs that depend on another input than their own, as far as regrouped inputs show it."""
    tolerance = agreement_rtol(network.dtype) * float(outputs.abs().max())
    deviations = torch.zeros_like(outputs)
    chunks = [(indices, trace.outputs) for indices, trace in regrouped]
    # The shape may depend on the number of inputs.
    if any(again.shape[1:] != outputs.shape[1:] for _, again in chunks):
        chunks = outputs_of_full_chunks(network, probe)
    for indices, again in chunks:
        if again.shape[1:] != outputs.shape[1:]:
            raise ValueError(
                f"each output must depend on its own input only, but with other inputs beside it the shape of an "
                f"output changes from {tuple(outputs.shape[1:])} to {tuple(again.shape[1:])}"
            )
        deviations[indices] = (again - outputs[indices]).abs().maximum(deviations[indices])
    if not bool((deviations <= tolerance).all()):
        _refuse_dependence(network, probe, outputs, deviations)


def _refuse_dependence(network: Network, probe: Probe, outputs: Tensor, deviations: Tensor) -> None:
    """Say what outputs depend on beside their own input, unless rounding moves them so far."""
    tolerance = agreement_rtol(network.dtype) * float(outputs.abs().max())
    with torch.no_grad():
        again = network.outputs(probe)
    if not bool(((again - outputs).abs() <= tolerance).all()):
        raise ValueError(
            "outputs must be a function of the inputs, but two evaluations differ: the module draws random numbers in "
            "evaluation mode, or keeps a state that changes; pass a behavior that does not"
        )
    noise = _output_rounding(network, probe, outputs)
    # A single output may be exact by chance: then the mean over all outputs counts.
    limits = (_NOISE_MARGIN * noise.maximum(noise.mean())).clamp(min=tolerance)
    index = int((deviations - limits).reshape(probe.size, -1).amax(1).argmax())
    if bool((deviations <= limits).all()):
        return
    raise ValueError(
        f"each output must depend on its own input only, but the output on input {index} changes with the other "
        f"inputs of the batch: the rank is then not defined input by input. Pass a behavior that returns the outputs "
        f"before inputs are compared or averaged, of an encoder for example"
    )


def _output_rounding(network: Network, probe: Probe, outputs: Tensor) -> Tensor:
    """Estimate how far rounding moves each output, by an evaluation in another precision; zero where there is none."""
    try:
        other, probe = in_other_precision(network, probe)
        with torch.no_grad():
            errors = (as_result(other.outputs(probe)) - as_result(outputs)).abs().to(outputs)
    except (TypeError, ValueError):
        return torch.zeros_like(outputs)
    scale = min(1.0, torch.finfo(network.dtype).eps / torch.finfo(other.dtype).eps)
    return scale * errors.nan_to_num(nan=0.0, posinf=0.0)


def check_copy(module: nn.Module, replica: nn.Module, result: Tensor, name: str) -> None:
    """Refuse a result that a copy computed with parameters of its original.

    A global variable or the trainer may lead the copy back to the original module; the result would then depend on
    the original's parameters.
    """
    check_computed(module, replica, result)
    originals = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not originals or not result.requires_grad:
        return
    used = torch.autograd.grad(result.sum(), originals, retain_graph=True, allow_unused=True)
    if any(gradient is not None for gradient in used):
        failure = vars(replica)["_copy_failure"]
        raise ValueError(
            f"a copy of the module is measured, but its parameters themselves are used: the module, or the {name}, "
            f"finds them in a global variable or through the trainer; use the module that is passed in"
            f"{'' if failure is None else f', as {failure}'}"
        )


def checked_loss(loss_fn: LossFunction, outputs: Tensor, targets: Any, *, is_known: bool = False) -> Tensor:
    """Return the loss, shape ``()``, or refuse what is no differentiable function of outputs and targets.

    One evaluation is enough for a loss that was found to be a function before (``is_known``).
    """
    hint = "pass loss_fn=lambda outputs, targets: ..."
    loss = _called_loss(loss_fn, outputs, targets, hint)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else described(loss)
        raise TypeError(f"loss_fn must return one floating point number as a tensor, got {got}: {hint} that does")
    if not bool(loss.isfinite().all()):
        by_target = [_rows_not_finite(target) for target in tensors_of(targets)]
        where = next((f", as the targets of the inputs {_listed(rows)} are not" for rows in by_target if rows), "")
        raise ValueError(f"the loss on the probe must be finite, got {loss.item()}{where}: leave these out, or mend it")
    if outputs.requires_grad and not loss.requires_grad:
        raise ValueError(
            f"the loss must be a differentiable function of the outputs, got the constant {loss.item()}: loss_fn may "
            f"neither ignore the outputs nor detach them"
        )
    if not is_known and loss_fn(outputs, targets).item() != loss.item():
        raise ValueError(
            "the loss must be a function of outputs and targets, but two evaluations differ: loss_fn draws random "
            "numbers, or changes with every call"
        )
    return loss.reshape(())


def _called_loss(loss_fn: LossFunction, outputs: Tensor, targets: Any, hint: str) -> Any:
    try:
        with warnings.catch_warnings():
            # Losses of torch only warn where they compare every output with every target.
            warnings.filterwarnings("error", message="Using a target size")
            return loss_fn(outputs, targets)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shapes = [f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors_of(targets)]
        is_of_shapes = isinstance(error, UserWarning)
        reason = "TypeError: targets must have the shape of the outputs" if is_of_shapes else cause(error)
        raise TypeError(
            f"loss_fn must take the outputs, shape {tuple(outputs.shape)}, and the targets of the probe, {shapes}, but "
            f"failed with {reason}; {hint} that brings them into the form which it needs"
        ) from error
