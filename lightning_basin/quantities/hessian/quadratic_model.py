"""The loss near the present weights, as its quadratic model in the outputs, chunk by chunk of inputs."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.logits import Link
from lightning_basin.functional.output_curvature import OutputCurvature
from lightning_basin.functional.rank import EPSILON
from lightning_basin.network.network import Network
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe

_GRAPH_ELEMENTS = 2**26  # float64 elements of activations in one graph: 512 MiB, several times as much with gradients


@dataclass(frozen=True, eq=False)
class QuadraticModel:
    r"""The quadratic model of a loss in the outputs, or its linear part, as a function of the parameters.

    At the weights where it is taken, the loss has the same Hessian as the model
    :math:`\sum_x s_x f_x(\theta) + \frac{1}{2} (f_x(\theta) - f_x)^T A_x (f_x(\theta) - f_x)`, with slope s and
    curvature A held fixed. The Hessian of the linear part, the first sum, is R = H - P, free of the cancellation of
    this difference. Both are sums over inputs, and are taken in chunks that fit into memory.

    Attributes:
        curvature: The curvature of the loss at its canonical outputs.
        link: The function that made the outputs of the canonical ones; ``None`` where they are the same.
        outputs: The canonical outputs at the weights where the model is taken, shape ``(k, c)``.
        chunks: The numbers of the inputs that are differentiated together.
        is_linear: Whether this is the linear part.
    """

    network: Network
    probe: Probe
    curvature: OutputCurvature
    link: Link | None
    outputs: Tensor
    chunks: tuple[Tensor, ...]
    is_linear: bool = False

    @cached_property
    def parameters(self) -> list[Tensor]:
        """The parameters of all layers, in the order of the Hessian's rows."""
        return self.network.parameters()

    @cached_property
    def linear_part(self) -> "QuadraticModel":
        """The linear part, whose Hessian is R."""
        return replace(self, is_linear=True)

    @cached_property
    def slope_uncertainty(self) -> float:
        """The fraction by which the rounding of the outputs may move the slope."""
        moved = EPSILON * weighted_rows(self.outputs.abs().reshape(-1, 1), self.curvature.matrices.abs())
        largest = self.curvature.slope.abs().max()  # Scale first: squares of small slopes are zero.
        rounding, slope = (moved + self.curvature.rounding) / largest, self.curvature.slope / largest
        return float(rounding.norm()) / float(slope.norm()) if largest > 0 else 0.0

    @property
    def cancellation(self) -> float:
        """How many times larger than the curvature the terms are that cancel in it."""
        scale = float(self.curvature.matrices.abs().max())
        return self.curvature.rounding / (EPSILON * scale) if scale > 0 else 0.0

    def outputs_of(self, chunk: Tensor) -> Tensor:
        """Run the network on some inputs and return the canonical outputs, shape ``(inputs, c)``."""
        is_whole = len(self.chunks) == 1
        with torch.backends.cudnn.flags(enabled=False):  # Its recurrent layers have no second derivative.
            outputs = self.network.outputs(self.probe if is_whole else self.probe.select(chunk))
        return _canonical(self.link, outputs.reshape(len(chunk), -1))

    def gradients(self, chunk: Tensor) -> list[Tensor]:
        """Return the gradient of the model's sum over some inputs by each parameter, with its graph.

        The inputs count as if the loss coupled them with no others. If all inputs share one graph, it is kept.
        """
        if len(self.chunks) > 1:
            return self.gradients_of(self.outputs_of(chunk), chunk)
        return self._gradients_of_all

    def gradients_of(self, outputs: Tensor, chunk: Tensor, *, create_graph: bool = True) -> list[Tensor]:
        """Return the gradients for canonical outputs of some inputs, shape ``(inputs, c)``, which have a graph."""
        value = self._value(outputs, chunk)
        if not value.requires_grad:  # Some inputs may use no parameter.
            return [torch.zeros_like(parameter) for parameter in self.parameters]
        gradients = torch.autograd.grad(value, self.parameters, create_graph=create_graph, materialize_grads=True)
        return list(gradients)

    @cached_property
    def _gradients_of_all(self) -> list[Tensor]:
        return self.gradients_of(self.outputs_of(self.chunks[0]), self.chunks[0])

    def _value(self, outputs: Tensor, chunk: Tensor) -> Tensor:
        value = (self.curvature.slope[chunk] * outputs).sum()
        if self.is_linear:
            return value
        moved = (outputs - self.outputs[chunk]).reshape(-1, 1)
        return value + 0.5 * (moved * weighted_rows(moved, self._matrices(chunk))).sum()

    def _matrices(self, chunk: Tensor) -> Tensor:
        matrices, slope = self.curvature.matrices, self.curvature.slope
        if not self.curvature.couples_inputs:
            return matrices[chunk]
        rows = torch.arange(slope.numel(), device=chunk.device).view(slope.shape)[chunk].flatten()
        return matrices[:, rows][:, :, rows]


def quadratic_model(
    runs: ProbeRuns, curvature: OutputCurvature, *, link: Link | None = None, chunk_size: int | None = None
) -> QuadraticModel:
    """Take the quadratic model of a loss at the present weights, for at most ``chunk_size`` inputs at once."""
    probe, trace = runs.probe, runs.full_trace
    outputs = _canonical(link, trace.outputs.detach().reshape(probe.size, -1))
    num_chunks = max(1, -(-num_activations(trace) // _GRAPH_ELEMENTS))
    if chunk_size is not None:
        num_chunks = max(num_chunks, -(-probe.size // chunk_size))
    indices = torch.arange(probe.size, device=outputs.device)
    chunks = indices.tensor_split(min(num_chunks, probe.size))
    return QuadraticModel(runs.network, probe, curvature, link, outputs, chunks)


def _canonical(link: Link | None, outputs: Tensor) -> Tensor:
    return outputs if link is None else link.logits(outputs)


def num_activations(trace: Trace) -> int:
    """Count the elements of all tensors that left a layer."""
    return sum(tensor.numel() for tensors in trace.leaving.values() for tensor in tensors)
