"""Outputs and loss must be functions, input by input: checks before anything is measured."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.naming import escaped
from lightning_basin.network.network import LossFunction, Network
from lightning_basin.network.remedies import cause, is_out_of_memory
from lightning_basin.network.replica import check_computed
from lightning_basin.network.rounding import agreement_rtol, in_other_precision
from lightning_basin.network.runs import other_batches
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe
from lightning_basin.tensors import dense_form, described, tensors_of

_NOISE_MARGIN = 32
"""Times the rounding that one evaluation in another precision shows, by which an output may be off."""


def check_outputs(network: Network, probe: Probe, trace: Trace) -> None:
    """Refuse outputs that are empty or not finite, and say where they began to be.

    Raises:
        ValueError: If they are.
    """
    outputs = trace.outputs
    if outputs.numel() == 0:
        raise ValueError(f"the outputs must hold at least one number per input, got shape {tuple(outputs.shape)}")
    rows = _not_finite(outputs)
    if rows:
        raise ValueError(
            f"outputs must be finite, but are NaN or infinite on {len(rows)} of the {probe.size} inputs, the first of "
            f"them input {rows[0]}{_origin_of_not_finite(network, probe, trace)}"
        )


def _origin_of_not_finite(network: Network, probe: Probe, trace: Trace) -> str:
    """Where NaN or infinity come from, and what helps."""
    named = (*network.named_parameters.items(), *network.module.named_buffers())
    plain = [(name, tensor) for name, tensor in named if tensor.is_floating_point() and dense_form(tensor) is None]
    names = [escaped(name) for name, tensor in plain if not bool(tensor.isfinite().all())]
    if names:
        return f": {_few(names)} of the module are not finite, most often after a step that diverged"
    found = [rows for tensor in tensors_of(probe.inputs) if (rows := _not_finite(tensor))]
    if found:
        return f": leave out the inputs {_few(found[0])}, which are not finite themselves"
    for name, tensors in trace.leaving.items():
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            return f": layer {escaped(name)!r} is the first whose results are not finite, of finite inputs and weights"
    return ": what follows the layers makes them of finite numbers"


def _not_finite(tensor: Tensor) -> list[int]:
    """Along the first axis, where a tensor holds NaN or infinity."""
    return (~tensor.detach().isfinite()).unsqueeze(1).flatten(1).any(1).nonzero().flatten().tolist()


def _few(items: Sequence[Any]) -> str:
    """Some items, and whether there are more."""
    return f"{[*items[:_SHOWN]]}" + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


_SHOWN = 5


def check_independence(network: Network, probe: Probe, outputs: Tensor, others: Sequence[tuple[Tensor, Trace]]) -> None:
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
    noise = _output_rounding(network, probe, outputs)
    # A single output may be exact by chance: then the mean over all outputs counts.
    limits = (_NOISE_MARGIN * noise.maximum(noise.mean())).clamp(min=tolerance)
    index = int((deviations - limits).reshape(probe.size, -1).amax(1).argmax())
    if bool((deviations <= limits).all()):
        return
    raise ValueError(
        f"each output must depend on its own input only, but the output on input {index} changes with the other "
        f"inputs of the batch: the rank is then not defined input by input"
    )


def _output_rounding(network: Network, probe: Probe, outputs: Tensor) -> Tensor:
    """How far rounding moves each output, seen from an evaluation in another precision, in proportion to its rounding.

    Returns:
        The errors in the shape of the outputs; zero where the network does not run in that precision.
    """
    try:
        other, probe = in_other_precision(network, probe)
        with torch.no_grad():
            errors = (other.outputs(probe).to(torch.float64) - outputs).abs()
    except (TypeError, ValueError):
        return torch.zeros_like(outputs)
    share = min(1.0, torch.finfo(network.dtype).eps / torch.finfo(other.dtype).eps)
    return share * errors.nan_to_num(nan=0.0, posinf=0.0)


def check_copy(module: nn.Module, replica: nn.Module, result: Tensor, name: str) -> None:
    """What finds the user's module where no copy leads would be evaluated on other parameters than the copy's."""
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


def checked_loss(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    """Return the loss, shape ``()``, or refuse what is no differentiable function of outputs and targets.

    Raises:
        TypeError: If the loss function fails, or does not return one floating point number.
        ValueError: If the loss is not finite, does not depend on the outputs, or changes from call to call.
    """
    shapes = [f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors_of(targets)]
    hint = "pass loss_fn=lambda outputs, targets: ..."
    try:
        loss = _loss_of_equal_shapes(loss_fn, outputs, targets)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise TypeError(
            f"loss_fn must take the outputs, shape {tuple(outputs.shape)}, and the targets of the probe, {shapes}, but "
            f"failed with {cause(error)}; {hint} that brings these into the form which it needs"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else described(loss)
        raise TypeError(f"loss_fn must return one floating point number as a tensor, got {got}: {hint} that does")
    if not bool(loss.isfinite().all()):
        rows = [_not_finite(target) for target in tensors_of(targets)]
        where = next((f", as the targets of the inputs {_few(found)} are not" for found in rows if found), "")
        raise ValueError(f"the loss on the probe must be finite, got {loss.item()}{where}: leave these out, or mend it")
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
            raise TypeError("targets must have the shape of the outputs") from warning
