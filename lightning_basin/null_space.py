"""Is the null space of the gradients real? The measured counterpart of `gradient_nullity`."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_basin.checks import check_number, check_order
from lightning_basin.evaluation import Evaluation, open_evaluation
from lightning_basin.functional.hessian import flat_vector
from lightning_basin.functional.manifold import null_directions, surviving_fraction
from lightning_basin.functional.rank import default_rtol, numerical_rank, singular_values
from lightning_basin.gradients.check import AutogradCheck
from lightning_basin.gradients.layers import layer_gradients
from lightning_basin.network.calls import ModuleBehavior
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.probe import Probe
from lightning_basin.settings import Settings

MAX_DENSE_ELEMENTS = 2**27
"""The largest number of elements of the gradients as dense rows, m · N: 1 GiB, of which some copies are needed."""

_CONVERGED = 1e-4  # residual at which a fraction is right to 0.01, its square root, also where two manifolds touch


@dataclass(frozen=True, kw_only=True)
class NullSpaceVerification:
    """How much is left of steps along random null directions, after their projection on the behavior manifold.

    Attributes:
        nullity: N minus the rank of the behavioral gradients.
        surviving_fractions: The fraction of each step that is left; 1.0000 where the direction is tangent to the
            manifold.
        residuals: The change of the outputs after each projection, relative to the change before; a fraction counts
            only where its residual is small.
    """

    nullity: int
    surviving_fractions: tuple[float, ...]
    residuals: tuple[float, ...]

    @property
    def surviving_fraction(self) -> float:
        """The smallest fraction over the directions; 1 where there is no null direction."""
        return min(self.surviving_fractions, default=1.0)

    @property
    def converged(self) -> bool:
        """Whether every projection has arrived on the manifold, so that the fractions count."""
        return max(self.residuals, default=0.0) <= _CONVERGED


def verify_null_space(
    module: nn.Module,
    inputs: Any,
    *,
    behavior: ModuleBehavior | None = None,
    num_directions: int = 4,
    step: float = 1e-3,
    rtol: float | None = None,
    seed: int = 0,
) -> NullSpaceVerification:
    """Measure whether the null space of the behavioral gradients is tangent to a manifold of equal behavior.

    ``gradient_nullity`` bounds the dimension of the manifold from above only. This function steps along random null
    directions and back onto the manifold: where the whole step survives, the directions are really free.

    Args:
        module: The module, which stays as it is; a copy in float64 is moved.
        inputs: The k inputs, or a `Probe`, as in `measure_basin`.
        behavior: The function from the module and the inputs to the outputs; ``None`` calls the module.
        num_directions: The number of random null directions to try.
        step: The length of the steps, relative to the norm of the parameters; absolute where the norm is below 1.
        rtol: The relative tolerance of the rank; ``None`` means ``max(m, N) * eps``.
        seed: The seed of the random directions.

    Raises:
        ValueError: If ``num_directions`` is not positive, ``step`` is not inside ``(0, 1)``, there are more than
            ``MAX_DENSE_ELEMENTS`` elements of gradients, or `measure_basin` would refuse the module or the inputs.

    Example:
        Two features are equal: the outputs depend on the sum of their weights only, and one direction is free:

        >>> twins = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
        >>> verification = verify_null_space(nn.Linear(2, 1), twins)
        >>> verification.nullity, round(verification.surviving_fraction, 4)
        (1, 1.0)
    """
    check_order(module, inputs=inputs, targets=None, behavior=behavior)
    check_number("num_directions", num_directions, "at least 1", lambda number: number >= 1)
    check_number("step", step, "inside (0, 1)", lambda length: 0.0 < length < 1.0, kind=float)
    settings = Settings(behavior=behavior, rtol=rtol, dtype="float64", seed=seed)
    probe = inputs if isinstance(inputs, Probe) else Probe(inputs)
    with open_evaluation(module, probe, settings) as evaluation:
        _check_size(evaluation)
        outputs = _MovableOutputs(evaluation)
        start = outputs.parameters
        gradients = outputs.gradients_at(start)
        tolerance = default_rtol(*gradients.shape) if rtol is None else rtol
        rank = numerical_rank(singular_values(gradients), rtol=tolerance)
        if rank == start.numel():
            return NullSpaceVerification(nullity=0, surviving_fractions=(), residuals=())
        generator = Generator().manual_seed(settings.seed)
        drawn = torch.randn(num_directions, start.numel(), generator=generator, dtype=torch.float64).to(start.device)
        length = step * max(1.0, float(start.norm()))
        fractions, residuals = zip(
            *(
                surviving_fraction(outputs.at, outputs.gradients_at, start, direction, step=length)
                for direction in null_directions(gradients, drawn, rank=rank)
            ),
            strict=True,
        )
    return NullSpaceVerification(nullity=start.numel() - rank, surviving_fractions=fractions, residuals=residuals)


class _MovableOutputs:
    """All outputs on the probe, and their gradients, as functions of the parameters in one vector."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._network, self._probe = evaluation.network, evaluation.probe
        self._seed = evaluation.settings.seed
        self.parameters = flat_vector(self._network.parameters()).detach()

    def at(self, parameters: Tensor) -> Tensor:
        """Return the outputs at some parameters, shape ``(m,)``."""
        with self._moved(parameters), torch.no_grad():
            return self._network.rows(self._network.outputs(self._probe)).flatten()

    def gradients_at(self, parameters: Tensor) -> Tensor:
        """Return the gradients at some parameters, as a measurement finds them, shape ``(m, N)``."""
        with self._moved(parameters):
            runs = ProbeRuns(self._network, self._probe)
            check = AutogradCheck(runs, Generator().manual_seed(self._seed))
            columns = {measured.layer: measured.gradients.rows() for measured in layer_gradients(runs, check)}
        return torch.cat([columns[layer] for layer in self._network.layers], dim=1)

    def _moved(self, parameters: Tensor) -> AbstractContextManager[None]:
        sizes = [parameter.numel() for parameter in self._network.parameters()]
        return self._network.at(torch.split(parameters, sizes))


def _check_size(evaluation: Evaluation) -> None:
    num_inputs, num_outputs = evaluation.probe.size, evaluation.num_outputs
    num_parameters = sum(layer.num_parameters for layer in evaluation.network.layers)
    if num_inputs * num_outputs * num_parameters > MAX_DENSE_ELEMENTS:
        largest = MAX_DENSE_ELEMENTS // (num_outputs * num_parameters)
        raise ValueError(
            f"a null space is verified with at most {MAX_DENSE_ELEMENTS} dense gradients, got {num_inputs} inputs x "
            f"{num_outputs} outputs x {num_parameters} parameters: "
            + (f"take a probe of at most {largest} inputs" if largest else "the network is too large for it")
        )
