"""Which functions of the outputs are measured: directions of them, or probabilities."""

from torch import Generator, Tensor

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.softmax import softmax_jacobian
from lightning_basin.tensors import as_result


def behavior_jacobian(evaluation: Evaluation) -> Tensor | None:
    """Return the behavior's derivative by the outputs, as blocks for `weighted_rows`; ``None`` for the outputs."""
    if not evaluation.settings.counts_probabilities:
        return None
    shape = evaluation.trace.outputs.shape
    if len(shape) == 1 or shape[1] < 2:  # noqa: PLR2004 - classes
        raise ValueError(
            f"behavior='probabilities' needs outputs with at least two classes along their second axis, got shape "
            f"{tuple(shape)}: pass behavior=lambda module, inputs: ... that returns the probabilities"
        )
    return softmax_jacobian(as_result(evaluation.trace.outputs))


def project_outputs(evaluation: Evaluation, generator: Generator) -> bool:
    """See too many outputs along fewer random directions; return whether they are: ranks are then lower bounds."""
    num_outputs = evaluation.num_outputs
    num_directions = evaluation.settings.num_directions(evaluation.probe.size, num_outputs)
    if num_directions == num_outputs:
        return False
    evaluation.notes.append(
        f"ranks are lower bounds: the {num_outputs} outputs of each input are seen along {num_directions} random "
        f"orthonormal directions"
    )
    evaluation.network.project_outputs(num_outputs, num_directions, generator)
    return True
