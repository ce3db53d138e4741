"""Outputs and loss must be functions, input by input: checks before anything is measured."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.network.copying import is_out_of_memory
from lightning_basin.network.network import LossFunction, ModuleBehavior, Network
from lightning_basin.network.replica import device_of, replicas
from lightning_basin.network.rounding import agreement_rtol, in_other_precision
from lightning_basin.network.runs import other_batches
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe
from lightning_basin.tensors import tensors_of

_NOISE_MARGIN = 32
"""Times the rounding that one evaluation in another precision shows, by which an output may be off."""


def check_float32_helps(module: nn.Module, behavior: ModuleBehavior | None, probe: Probe, refused: ValueError) -> None:
    """Where an operation knows float32 only, say what float32 is refused for, if it does not help."""
    replica, behavior = replicas(module, behavior, dtype=torch.float32)
    network, probe = Network(replica, behavior, dtype=torch.float32), probe.to(device_of(module), torch.float32)
    try:
        with torch.no_grad():
            before = network.outputs(probe)
            network.outputs(probe.select(range(max(1, probe.size // 2))))  # A state may follow what it has seen.
            if not torch.equal(network.outputs(probe), before):
                raise ValueError("two evaluations differ, as the module keeps a state that changes")
    except (TypeError, ValueError) as error:
        raise ValueError(f"neither float64 nor float32 runs {type(module).__name__}: {error}") from refused


def check_outputs(probe: Probe, outputs: Tensor) -> None:
    """Refuse outputs that are empty or not finite.

    Raises:
        ValueError: If they are.
    """
    if outputs.numel() == 0:
        raise ValueError(f"the outputs must hold at least one number per input, got shape {tuple(outputs.shape)}")
    if not bool(outputs.isfinite().all()):
        count = int((~outputs.isfinite()).reshape(probe.size, -1).any(1).sum())
        raise ValueError(f"outputs must be finite, but are NaN or infinite on {count} of the {probe.size} inputs")


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


def check_copy(module: nn.Module, result: Tensor, name: str) -> None:
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


def checked_loss(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    """Return the loss, shape ``()``, or refuse what is no differentiable function of outputs and targets.

    Raises:
        TypeError: If the loss function fails, or does not return one floating point number.
        ValueError: If the loss is not finite, does not depend on the outputs, or changes from call to call.
    """
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
