"""Limits of a measurement, in rows, parameters, products and elements that are held."""

from dataclasses import dataclass

GROUP_ELEMENTS = 2**27
"""Float64 elements in the gradients, or their factors, of layers that are measured together: 1 GiB."""

MAX_DENSE_PARAMETERS = 500
"""Largest number of parameters for which ``hessian="auto"`` also forms the Hessian: some 0.1 s."""

MAX_UNPROVED_PARAMETERS = 3000
"""The same where the loss is not a convex function of the outputs, and only all of the Hessian decides: seconds."""

NETWORK_PRODUCTS = 80
"""Most products with R that bound its norm; some 20 are enough for a factor of two."""

LAYER_PRODUCTS = 100
"""Most products with the blocks of all layers together; at least one each, which finds the blocks where R is zero."""


class MemoryBudgetError(ValueError):
    """A measurement cannot be cut to the memory that it may use."""


@dataclass(frozen=True, kw_only=True)
class HessianLimits:
    """What may be held at once while a Hessian is measured.

    Attributes:
        chunk_size: The number of inputs that are differentiated together; ``None`` for all, whose graph then holds the
            outputs, too.
        basis_elements: The float64 elements of the vectors of a Lanczos iteration; 2 GiB.
        batch_elements: The float64 elements of the activations of one batched backward pass; 256 MiB.
        waiting_elements: The float64 elements of gradients that wait for their sketch; 512 MiB.
    """

    chunk_size: int | None = None
    basis_elements: int = 2**28
    batch_elements: int = 2**25
    waiting_elements: int = 2**26


PROBE_ROWS = 640
"""The number of outputs on the probe of ``probe="auto"``: each decomposition then takes about 0.1 s."""

MOST_PROBE_INPUTS = 128
"""The number of inputs of ``probe="auto"`` where these have no more than `PROBE_ROWS` outputs."""

LEAST_PROBE_INPUTS = 32
"""The least number of inputs of ``probe="auto"``."""

MAX_ROWS = 4096
"""Largest number of outputs on a probe: each decomposition then takes about ten seconds on two cores."""

AUTO_ROWS = 2048
"""The number of outputs to which ``max_outputs="auto"`` brings larger numbers down."""
