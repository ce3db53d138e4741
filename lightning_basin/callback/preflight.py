"""What is looked at before training: the first training step, and whether a measurement is possible."""

from dataclasses import replace
from typing import Any

from torch import nn

from lightning_basin.callback.described_step import step_behavior
from lightning_basin.callback.request import LOSS_ATTRIBUTES, Request, loss_of
from lightning_basin.callback.silence import quiet_behavior, quiet_loss
from lightning_basin.callback.training_step import agrees_with, read_training_step
from lightning_basin.limits import MemoryBudgetError
from lightning_basin.measure import NumInputs, check_measurable
from lightning_basin.probe import Probe


def read_first_step(request: Request, module: nn.Module, batch: Any) -> bool:
    """Read a training step, and return whether its outputs are to be measured.

    They are not where the step trains just what the module returns.
    """
    if not hasattr(module, "training_step"):
        return False
    findings, trainer = request.findings, request.trainer
    try:
        step = read_training_step(module, batch, trainer)
    except Exception as error:  # Whatever a step raises that is run alone: then the batch has to say it.
        findings.unread = str(error)
        return False
    with_loss = request.arguments.loss_fn is None
    loss_fn = quiet_loss(loss_of(module), trainer) if with_loss else None
    if agrees_with(step, module, batch, quiet_behavior(None, trainer), loss_fn, with_loss=with_loss):
        return False
    try:
        behavior = quiet_behavior(step_behavior(step.calls), trainer)
        # The batch may be larger than the probe.
        settings = replace(request.settings(), behavior=behavior, layers="auto", memory_budget=None, max_outputs="auto")
        check_measurable(module, Probe(batch), settings)
    except (TypeError, ValueError) as error:  # Inputs that a loss couples, say.
        findings.unread = str(error)
        return False
    findings.step_calls, findings.loss_in_words = step.calls, step.loss_in_words
    request.notices.inform(str(step))
    return True


def check_request(request: Request, module: nn.Module, probe: Probe, *, num_inputs: NumInputs) -> None:
    """Evaluate a module once, without and with the loss, and say how large a measurement will be.

    The probe has the inputs that there are already, of ``num_inputs``. A loss of the module that does not fit is left
    out of the request.
    """
    for _ in request.training_set() or ():  # Whether inputs and targets of its first batch can be distinguished.
        break
    try:
        plan = check_measurable(module, probe, request.settings(), num_inputs=num_inputs)
    except MemoryBudgetError as error:  # The measurements will say so; training goes on.
        request.notices.warn(f"BasinMonitor will not be able to measure: {error}")
        return
    request.notices.inform(f"BasinMonitor measures {plan}")
    if plan.unseen:
        request.notices.warn(
            f"The measured outputs do not depend on the layers {list(plan.unseen)}, which training trains "
            f"otherwise (by a penalty, or through other outputs): their ranks are 0. HINT: pass "
            f"BasinMonitor(behavior=...)"
        )
    _check_loss(request, module, probe, num_inputs=num_inputs)


def _check_loss(request: Request, module: nn.Module, probe: Probe, *, num_inputs: NumInputs) -> None:
    """Evaluate the loss once; a loss of the module that was not passed is left out where it does not fit."""
    is_passed, is_read = request.arguments.loss_fn is not None, request.findings.step_calls is not None
    probe, loss_fn = request.with_loss(module, probe)
    if loss_fn is None and is_read:  # The sentence on the training step has said it.
        return
    if loss_fn is None:
        request.notices.warn(
            f"Loss and Hessian are not measured: {type(module).__name__} has no callable "
            f"{' or '.join(map(repr, LOSS_ATTRIBUTES))}. HINT: pass BasinMonitor(loss_fn=...)"
        )
        return
    try:
        if callable(loss_fn) and probe.targets is None:
            raise TypeError("it needs targets, and the batches hold none: pass batch_fn or probe=(inputs, targets)")
        settings = request.settings(loss_fn)
        check_measurable(module, probe, settings, num_inputs=num_inputs, is_loss_given=is_passed or is_read)
    except MemoryBudgetError as error:
        request.notices.warn(f"BasinMonitor will not be able to measure: {error}")
    except (TypeError, ValueError) as error:
        if is_passed:
            raise
        request.findings.leaves_out_loss = True
        request.notices.warn(
            f"Loss and Hessian are not measured with the loss of {type(module).__name__}: {error}. "
            f"HINT: pass BasinMonitor(loss_fn=...)"
        )
