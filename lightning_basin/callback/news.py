"""What a measurement brings that the one before had not: zero loss, first merged inputs, a bracket that closes."""

from collections.abc import Iterator

from lightning_basin.layer_names import tag
from lightning_basin.record import BasinRecord


def news(record: BasinRecord, earlier: list[BasinRecord], zero_loss_step: int | None) -> Iterator[str]:
    """Say in one sentence each what is new, and so happens once in a run.

    Args:
        record: The newest record.
        earlier: All records before it, oldest first.
        zero_loss_step: The step at which the loss had reached zero; ``None`` where it has not.

    Example:
        >>> import torch
        >>> from lightning_basin import measure_basin
        >>> record = measure_basin(torch.nn.Linear(2, 1), torch.ones(3, 2))
        >>> list(news(record, [], None))
        []
    """
    step = "" if record.step is None else f" at step {record.step:,}"
    if record.step is not None and record.step == zero_loss_step:
        yield f"The loss has reached zero{step}, with a gradient rank of {record.gradient_rank:,}"
    # The first layer is entered by the inputs themselves, of which some may be equal.
    for name, layer in list(record.layers.items())[1:]:
        if layer.duplicated_activations and earlier and not _has_merged(earlier, name):
            yield (
                f"Layer {tag(name)!r} has begun to merge inputs{step}: {layer.duplicated_activations:,} of "
                f"{record.num_inputs:,} have the activation of another one"
            )
    if record.hessian_certified and earlier and not any(other.hessian_certified for other in earlier):
        yield (
            f"The bracket of the Hessian's nullity has closed{step}: {record.hessian_nullity_lower:,} of "
            f"{record.num_parameters:,} directions are flat"
        )


def _has_merged(records: list[BasinRecord], layer: str) -> bool:
    return any(record.layers[layer].duplicated_activations for record in records if layer in record.layers)
