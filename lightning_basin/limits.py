"""Limits of a measurement, in rows, parameters, products and numbers that are held."""

from dataclasses import dataclass

GROUP_ELEMENTS = 2**27
"""Float64 elements in the gradients, or their factors, of layers that are measured together: 1 GiB."""

MAX_DENSE_PARAMETERS = 500
"""Largest number of parameters for which ``hessian="auto"`` also forms the Hessian: some 0.1 s."""

MAX_UNPROVED_PARAMETERS = 3000
"""The same where the loss is not a convex function of the outputs alone, and nothing else is to be had: seconds."""

NETWORK_PRODUCTS = 80
"""At most so many products with R bound its norm; some 30 are enough for a factor of two."""

LAYER_PRODUCTS = 100
"""And so many with the blocks of all layers together; at least one each, which finds those where R is zero."""


class MemoryBudgetError(ValueError):
    """A measurement cannot be cut to the memory that it may use."""


@dataclass(frozen=True, kw_only=True)
class HessianLimits:
    """What may be held at once while a Hessian is measured.

    Attributes:
        chunk_size: Inputs that are differentiated together; ``None`` for all, in whose graph the outputs then are.
        basis_elements: Float64 numbers in the vectors of a Lanczos iteration; 2 GiB.
        batch_elements: And in the activations of one batched backward pass; 256 MiB.
        waiting_elements: And in gradients that wait for their sketch; 512 MiB.
    """

    chunk_size: int | None = None
    basis_elements: int = 2**28
    batch_elements: int = 2**25
    waiting_elements: int = 2**26


MAX_ROWS = 4096
"""Largest number of outputs on a probe: each decomposition then takes about ten seconds on two cores."""

AUTO_ROWS = 2048
"""What ``max_outputs="auto"`` brings larger numbers down to."""
