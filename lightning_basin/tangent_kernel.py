"""Products of all pairs of behavioral gradients: the empirical neural tangent kernel."""

from typing import Any

from torch import Generator, Tensor, nn

from lightning_basin.checks import check_order
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
from lightning_basin.tensors import float64_device


def neural_tangent_kernel(
    module: nn.Module,
    inputs: Any,
    *,
    behavior: ModuleBehavior | None = None,
    memory_budget: int | None = None,
    dtype: Precision = "float64",
    seed: int = 0,
) -> Tensor:
    """Compute the Gram matrix of the behavioral gradients, G Gᵀ, without G.

    It is the empirical neural tangent kernel (Jacot, Gabriel and Hongler, 2018, section 4). Its eigenvalues are the
    squares of the singular values of G, so that singular values below 1e-8 of the largest one (3e-4 in float32) are
    lost in rounding. `measure_basin` finds the rank of G itself.

    Args:
        module: The module, which stays as it is; a copy runs in evaluation mode.
        inputs: The k inputs, or a `Probe`, as in `measure_basin`.
        behavior: The function from the module and the inputs to the outputs; ``None`` calls the module.
        memory_budget: The bytes that the computation may use; ``None`` means half of the free memory.
        dtype: The precision in which the copy is run and differentiated, and the gradients are multiplied.
        seed: The seed of the combination of gradients that is compared with autograd.

    Returns:
        The kernel, shape ``(m, m)``, rows and columns ordered by input, then output; on the device of the module, but
        on the CPU where this device has no float64.

    Raises:
        TypeError: If `measure_basin` would raise it.
        ValueError: If `measure_basin` would raise it; but any number of outputs is allowed that fits into
            ``memory_budget``.

    Example:
        The gradient of a linear layer's output is the input for the weight, and 1 for the bias:

        >>> import torch
        >>> neural_tangent_kernel(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        tensor([[ 6.,  4.],
                [ 4., 10.]], dtype=torch.float64)
    """
    check_order(module, inputs=inputs, targets=None, behavior=behavior)
    settings = Settings(behavior=behavior, hessian=False, memory_budget=memory_budget, dtype=dtype, seed=seed)
    probe = inputs if isinstance(inputs, Probe) else Probe(inputs)

    def make_plan(network: Network, sample: Probe, trace: Trace) -> MeasurementPlan:
        num_outputs = network.rows(trace.outputs).shape[1]
        return plan_measurement(
            network,
            sample,
            trace,
            num_inputs=probe.size,
            num_outputs=num_outputs,
            with_ranks=False,
            memory_budget=memory_budget,
        )

    precision = settings.torch_dtype
    with open_evaluation(module, probe, settings, make_plan) as evaluation:
        evaluation.network.gradient_dtype = precision
        kernel = GramMatrix(evaluation.num_rows, float64_device(evaluation.rows.device), dtype=precision)
        check = AutogradCheck(evaluation.runs, Generator().manual_seed(settings.seed))
        for measured in layer_gradients(evaluation.runs, check, max_elements=evaluation.max_elements):
            measured.gradients.add_gram(kernel)
        return kernel.whole()
