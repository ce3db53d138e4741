"""Products of all pairs of behavioral gradients: the empirical neural tangent kernel."""

from typing import Any

from torch import Generator, Tensor, nn

from lightning_basin.evaluation import open_evaluation
from lightning_basin.functional.gram import GramMatrix
from lightning_basin.gradients.check import AutogradCheck
from lightning_basin.gradients.layers import layer_gradients
from lightning_basin.memory import MeasurementPlan, plan_measurement
from lightning_basin.network.calls import ModuleBehavior
from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe
from lightning_basin.settings import Precision, Settings


def neural_tangent_kernel(
    module: nn.Module,
    inputs: Any,
    *,
    behavior: ModuleBehavior | None = None,
    memory_budget: int | None = None,
    dtype: Precision = "float64",
    seed: int = 0,
) -> Tensor:
    """The Gram matrix of the behavioral gradients, G Gᵀ, without G (Jacot, Gabriel and Hongler, 2018, section 4).

    It squares: its eigenvalues are the squares of the singular values of G, and what is below 1e-8 of the largest one
    (3e-4 in float32) is rounding. `measure_basin` finds the rank of G itself.

    Args:
        module: As of `measure_basin`: copied, evaluated in evaluation mode, and left as it was.
        inputs: As of `measure_basin`.
        behavior: As of `measure_basin`; ``None`` calls the module.
        memory_budget: As of `measure_basin`.
        dtype: In which the copy is run and differentiated, and the gradients are multiplied.
        seed: Of the combination of gradients that is compared with autograd.

    Returns:
        Shape ``(m, m)``, rows and columns ordered by input, then output; on the device of the module, but on the CPU
        where that device has no float64.

    Raises:
        TypeError: As `measure_basin`.
        ValueError: As `measure_basin`; but any number of outputs that fits into ``memory_budget``.

    Example:
        The output of a linear layer has the input as its gradient, and 1 by the bias:

        >>> import torch
        >>> neural_tangent_kernel(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        tensor([[ 6.,  4.],
                [ 4., 10.]], dtype=torch.float64)
    """
    settings = Settings(behavior=behavior, hessian=False, memory_budget=memory_budget, dtype=dtype, seed=seed)
    probe = inputs if isinstance(inputs, Probe) else Probe(inputs)

    def make_plan(network: Network, few: Probe, trace: Trace) -> MeasurementPlan:
        num_outputs = network.rows(trace.outputs).shape[1]
        return plan_measurement(
            network,
            few,
            trace,
            num_inputs=probe.size,
            num_outputs=num_outputs,
            with_ranks=False,
            memory_budget=memory_budget,
        )

    dtype_of_products = settings.torch_dtype
    with open_evaluation(module, probe, settings, make_plan, gradient_dtype=dtype_of_products) as evaluation:
        kernel = GramMatrix(evaluation.num_rows, evaluation.rows.device, dtype=dtype_of_products)
        check = AutogradCheck(evaluation.traced, Generator().manual_seed(seed))
        for measured in layer_gradients(evaluation.traced, check, max_elements=evaluation.max_elements):
            measured.gradients.add_gram(kernel)
        return kernel.whole()
