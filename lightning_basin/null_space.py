"""Is the null space of the gradients real? The measured counterpart of `gradient_nullity`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_basin.evaluation import open_evaluation
from lightning_basin.functional.jacobian import behavioral_gradients, gradient_rows
from lightning_basin.functional.manifold import null_directions, surviving_fraction
from lightning_basin.functional.rank import default_rtol, numerical_rank, singular_values
from lightning_basin.network.calls import ModuleBehavior
from lightning_basin.probe import Probe
from lightning_basin.settings import Settings
from lightning_basin.tensors import tensors_of

MAX_DENSE_ELEMENTS = 2**27
"""Largest number of dense gradients, outputs on the probe times parameters: 1 GiB, of which some copies are needed."""

_CONVERGED = 1e-4  # Where two manifolds touch, the distance goes with the square root: a fraction is right to 0.01.


@dataclass(frozen=True, kw_only=True)
class NullSpaceVerification:
    """What was left of steps along random null directions, projected back on the behavior manifold.

    Attributes:
        nullity: N minus the rank of the behavioral gradients.
        surviving_fractions: For each direction; 1.0000 where the manifold has the direction in its tangent space.
        residuals: What the projection left of the change of the outputs, relative to it; a fraction counts only where
            this is small.
    """

    nullity: int
    surviving_fractions: tuple[float, ...]
    residuals: tuple[float, ...]

    @property
    def surviving_fraction(self) -> float:
        """The smallest over the directions; 1 where there is no null direction."""
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

    ``gradient_nullity`` bounds the dimension of the manifold from above only. This steps along random null directions
    and back onto the manifold: where the whole step survives, the directions are really free.

    Args:
        module: Left as it is; a float64 copy is moved.
        inputs: As of `measure_basin`.
        behavior: As of `measure_basin`.
        num_directions: How many random null directions to try.
        step: Length of the steps, relative to the norm of the parameters (absolute where that is below 1).
        rtol: Relative tolerance of the rank; ``None`` means ``max(m, N) * eps``.
        seed: Of the random directions.

    Raises:
        ValueError: If ``num_directions`` is not positive or ``step`` not inside ``(0, 1)``, or there are more than
            ``MAX_DENSE_ELEMENTS`` gradients; and as `measure_basin`.

    Example:
        Adding to the weight of one input what is taken from an equal one leaves all outputs as they are:

        >>> twins = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
        >>> verification = verify_null_space(nn.Linear(2, 1), twins)
        >>> verification.nullity, round(verification.surviving_fraction, 4)
        (1, 1.0)
    """
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, got {num_directions}")
    if not 0.0 < step < 1.0:
        raise ValueError(f"step must be inside (0, 1), got {step}")
    settings = Settings(behavior=behavior, rtol=rtol, seed=seed)
    probe = inputs if isinstance(inputs, Probe) else Probe(inputs)
    with open_evaluation(module, probe, settings) as evaluation:
        network, probe = evaluation.network, evaluation.probe
        names = [name for layer in network.layers for name in layer.parameters]
        values = {name: network.named_parameters[name].detach() for name in names}
        start = torch.cat([value.flatten() for value in values.values()])
        _check_size(probe.size, evaluation.num_outputs, start.numel())

        def unflattened(parameters: Tensor) -> Mapping[str, Tensor]:
            parts = torch.split(parameters, [value.numel() for value in values.values()])
            return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}

        def outputs(parameters: Tensor) -> Tensor:
            with torch.no_grad():
                return network.functional(probe, tensors_of(probe.inputs), unflattened(parameters)).flatten()

        def jacobian(parameters: Tensor) -> Tensor:
            tensors = tensors_of(probe.inputs)
            try:
                return behavioral_gradients(
                    lambda values, tensors: network.functional(probe, tensors, values),
                    unflattened(parameters),
                    tensors,
                )
            except RuntimeError:  # vmap is beyond some modules.
                moved = parameters.detach().requires_grad_()
                return gradient_rows(network.functional(probe, tensors, unflattened(moved)), [moved])

        gradients = jacobian(start)
        tolerance = default_rtol(*gradients.shape) if rtol is None else rtol
        rank = numerical_rank(singular_values(gradients), rtol=tolerance)
        nullity = start.numel() - rank
        if nullity == 0:
            return NullSpaceVerification(nullity=0, surviving_fractions=(), residuals=())
        generator = Generator().manual_seed(seed)
        drawn = torch.randn(num_directions, start.numel(), generator=generator, dtype=torch.float64).to(start.device)
        length = step * max(1.0, float(start.norm()))
        tried = [
            surviving_fraction(outputs, jacobian, start, direction, step=length)
            for direction in null_directions(gradients, drawn, rank=rank)
        ]
    return NullSpaceVerification(
        nullity=nullity,
        surviving_fractions=tuple(fraction for fraction, _ in tried),
        residuals=tuple(left for _, left in tried),
    )


def _check_size(num_inputs: int, num_outputs: int, num_parameters: int) -> None:
    if num_inputs * num_outputs * num_parameters > MAX_DENSE_ELEMENTS:
        largest = MAX_DENSE_ELEMENTS // (num_outputs * num_parameters)
        raise ValueError(
            f"a null space is verified with at most {MAX_DENSE_ELEMENTS} dense gradients, got {num_inputs} inputs x "
            f"{num_outputs} outputs x {num_parameters} parameters: "
            + (f"take a probe of at most {largest} inputs" if largest else "the network is too large for it")
        )
