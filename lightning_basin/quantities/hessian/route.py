"""How the Hessian of a loss is measured: by the mode that was asked for, and by what the loss allows."""

from dataclasses import dataclass

from lightning_basin.limits import MAX_DENSE_PARAMETERS, MAX_UNPROVED_PARAMETERS
from lightning_basin.quantities.hessian.loss import LossCurvature
from lightning_basin.settings import HessianMode


@dataclass(frozen=True, kw_only=True)
class HessianRoute:
    """How the Hessian of a loss is measured: by products with R, formed or not at all; and the record's note."""

    takes_products: bool
    is_dense: bool
    is_left_out: bool
    note: str | None


def hessian_route(mode: HessianMode, loss: LossCurvature, *, num_parameters: int, has_chunks: bool) -> HessianRoute:
    """Choose how the Hessian is measured, by a mode of `measure_basin` and by what the loss allows."""
    max_dense = MAX_DENSE_PARAMETERS if loss.is_provable else MAX_UNPROVED_PARAMETERS
    is_dense = mode == "dense" or (mode == "auto" and num_parameters <= max_dense)
    # A penalty may meet the outputs in any way: chunks of inputs do not add up.
    is_cut_penalty = loss.has_penalty and has_chunks
    is_left_out = (not loss.is_provable and not is_dense) or is_cut_penalty or loss.curvature.is_flat
    return HessianRoute(
        takes_products=mode != "gauss-newton",
        is_dense=is_dense,
        is_left_out=is_left_out,
        note=_note(loss, is_left_out=is_left_out, is_cut_penalty=is_cut_penalty),
    )


def _note(loss: LossCurvature, *, is_left_out: bool, is_cut_penalty: bool) -> str | None:
    if loss.curvature.is_flat:
        return (
            "the loss neither pulls nor curves at the outputs, to the last digit, but does elsewhere: nothing is "
            "known of its Hessian, which is left out"
        )
    if not loss.is_provable:
        why = "holds parameters themselves" if loss.is_convex else "is not convex in the outputs"
        done = "is left out" if is_left_out else "is formed"
        remedy = (
            "which takes a memory_budget that holds all inputs at once"
            if is_cut_penalty
            else f"'auto' forms it up to {MAX_UNPROVED_PARAMETERS} parameters, hessian='dense' always"
        )
        return f"the loss {why}, so that no products bracket its Hessian's nullity: it {done}; {remedy}"
    if not loss.curvature.residual_is_zero and not bool(loss.curvature.matrices.any()):
        return (
            "the loss is piecewise linear in the outputs: its second derivative is zero almost everywhere, and all "
            "that the Hessian holds is residual curvature, which resolves no nullity"
        )
    return None
