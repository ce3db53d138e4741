"""Products with the Hessian of the loss, and with its residual part, by double backward."""

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import or_

import torch
from torch import Tensor

from lightning_basin.functional.differences import contradicted, relative_direction
from lightning_basin.functional.hessian import check_connected, hessian_matrix, hessian_product, is_connected
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.logits import Link
from lightning_basin.functional.output_curvature import OutputCurvature
from lightning_basin.functional.rank import EPSILON
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe

_GRAPH_ELEMENTS = (
    2**26
)  # float64 numbers in activations whose graph is kept: 512 MiB, some times that with the gradients
_BESIDE = 1e-3  # of their size, by which weights are moved to where nothing is exactly at a kink
_NUM_DIRECTIONS = 3  # along which differences must contradict a derivative: at a kink one may


class HessianProducts:
    r"""Products with the Hessian and with its residual part, by plain double backward.

    At the point where it is taken, the Hessian of the loss is that of its quadratic model in the outputs,
    :math:`\sum_x s_x f_x(\theta) + \frac{1}{2} (f_x(\theta) - f_x)^T A_x (f_x(\theta) - f_x)`, with slope s and
    curvature A held fixed. The first sum alone gives R, without the cancellation of H - P; and both are sums over
    inputs, so that they can be taken in chunks that fit into memory.

    Args:
        network: To differentiate.
        probe: The inputs.
        trace: Of the probe.
        curvature: Of the loss, in all outputs.
        chunk_size: Inputs that are differentiated together, where memory asks for it.
        link: What made the outputs of the logits that the loss is a function of; ``None`` where these are the outputs.
    """

    def __init__(
        self,
        network: Network,
        probe: Probe,
        trace: Trace,
        curvature: OutputCurvature,
        *,
        chunk_size: int | None = None,
        link: Link | None = None,
    ) -> None:
        assert curvature.slope is not None
        self._network, self._probe, self._curvature = network, probe, curvature
        self._parameters, self._link = network.parameters(), link
        self._outputs = self._seen(trace.outputs.detach().reshape(probe.size, -1))
        self._slope = curvature.slope
        num_chunks = max(1, -(-num_activations(trace) // _GRAPH_ELEMENTS))
        if chunk_size is not None:
            num_chunks = max(num_chunks, -(-probe.size // chunk_size))
        indices = torch.arange(probe.size, device=self._outputs.device)
        self._chunks = indices.tensor_split(min(num_chunks, probe.size))
        self._kept: dict[bool, list[Tensor]] = {}

    def _seen(self, outputs: Tensor) -> Tensor:
        return outputs if self._link is None else self._link.logits(outputs)

    @cached_property
    def uncertainty(self) -> float:
        """By which fraction the rounding of the outputs may move the slope."""
        pulled = EPSILON * weighted_rows(self._outputs.abs().reshape(-1, 1), self._curvature.matrices.abs())
        largest = self._slope.abs().max()  # By which all is divided: squares of small slopes are zero.
        moved, slope = (pulled + self._curvature.rounding) / largest, self._slope / largest
        return float(moved.norm()) / float(slope.norm()) if largest > 0 else 0.0

    @property
    def cancellation(self) -> float:
        """How much larger than the curvature the terms are that cancel in it."""
        scale = float(self._curvature.matrices.abs().max())
        return self._curvature.rounding / (EPSILON * scale) if scale > 0 else 0.0

    def operator(self, layers: Sequence[Layer], *, of_residual: bool) -> Callable[[Tensor], Tensor]:
        """From a direction in the parameters of some layers to the product with their diagonal block."""
        chosen = {name for layer in layers for name in layer.parameters}
        names = [name for layer in self._network.layers for name in layer.parameters]
        indices = [index for index, name in enumerate(names) if name in chosen]
        # Inputs that the loss couples must be seen together, except where all are in one graph anyway.
        is_apart = self._is_coupled and not of_residual and len(self._chunks) > 1

        def product(direction: Tensor) -> Tensor:
            total = self._sum_of_products(indices, direction, of_residual=of_residual or is_apart)
            if is_apart:
                total += self._gauss_newton_product(indices, direction)
            check_finite(total, layers)
            return total

        return product

    def _sum_of_products(self, indices: Sequence[int], direction: Tensor, *, of_residual: bool) -> Tensor:
        variables = [self._parameters[index] for index in indices]
        total = torch.zeros_like(direction)
        for chunk in self._chunks:
            gradients = self._gradients(chunk, of_residual=of_residual)
            gradient = torch.cat([gradients[index].flatten() for index in indices])
            total += hessian_product(gradient, variables, direction)
        return total

    def residual_matrix(self, *, chunk_size: int) -> Tensor:
        """R itself, shape ``(N, N)``.

        Args:
            chunk_size: Columns per batched backward pass.
        """
        num_parameters = sum(parameter.numel() for parameter in self._parameters)
        total = self._outputs.new_zeros(num_parameters, num_parameters)
        for chunk in self._chunks:
            model = self._model(chunk, of_residual=True)
            if model.requires_grad:  # Some inputs may use no parameter.
                total += hessian_matrix(model, self._parameters, chunk_size=chunk_size)
        return total

    def _gauss_newton_product(self, indices: Sequence[int], direction: Tensor) -> Tensor:
        """GᵀAG times a direction: first how all outputs move, then what pulls them back."""
        variables = [self._parameters[index] for index in indices]
        moved = torch.cat([self._directional_derivative(chunk, variables, direction) for chunk in self._chunks])
        pulled = weighted_rows(moved.reshape(-1, 1), self._curvature.matrices).view(moved.shape)
        total = torch.zeros_like(direction)
        for chunk in self._chunks:
            outputs = self._outputs_of(chunk)
            if outputs.requires_grad:
                parts = torch.autograd.grad(outputs, variables, pulled[chunk], materialize_grads=True)
                total += torch.cat([part.flatten() for part in parts])
        return total

    def _directional_derivative(self, chunk: Tensor, variables: Sequence[Tensor], direction: Tensor) -> Tensor:
        """How the outputs of some inputs move along a direction, as the derivative of a product by its left factor."""
        outputs = self._outputs_of(chunk)
        weights = torch.zeros_like(outputs, requires_grad=True)
        if not outputs.requires_grad:
            return weights.detach()
        parts = torch.autograd.grad(outputs, variables, weights, create_graph=True, materialize_grads=True)
        gradient = torch.cat([part.flatten() for part in parts])
        if not gradient.requires_grad:
            return weights.detach()
        (moved,) = torch.autograd.grad(gradient, weights, direction, materialize_grads=True)
        return moved

    def check_differences(self) -> None:
        """Refuse derivatives that differences contradict: of the outputs, or of the gradients that R is made of.

        They are compared a little beside the weights as they are: a wrong formula is wrong there as well, but hardly a
        rectifier is given an exact zero, where it has no derivative.

        Raises:
            RuntimeError: If along each of some random directions the derivative of an operation is wrong.
        """
        sizes = [layer.num_parameters for layer in self._network.layers]
        wrong: list[int] = []
        for seed in range(_NUM_DIRECTIONS):
            direction = relative_direction(self._parameters, seed=seed)
            beside = _BESIDE * relative_direction(self._parameters, seed=seed + _NUM_DIRECTIONS)
            movement, product = self._derivatives_at(beside, direction)

            def outputs(step: float, beside: Tensor = beside, direction: Tensor = direction) -> list[Tensor]:
                return [self._outputs_at(beside + step * direction)]

            def gradient(step: float, beside: Tensor = beside, direction: Tensor = direction) -> list[Tensor]:
                return list(torch.split(self._gradient_at(beside + step * direction), sizes))

            wrong = contradicted([movement], outputs) or contradicted(torch.split(product, sizes), gradient)
            if not wrong:
                return
        raise RuntimeError(
            f"the derivatives of the module do not agree with differences of its outputs and gradients, in layer "
            f"{self._network.layers[wrong[-1]].name!r} or after it: an operation has a wrong first or second "
            f"derivative, or detach() hides a part of it"
        )

    def _derivatives_at(self, shift: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """How the outputs move along a direction, and R times it, at other parameters."""
        moved, total = [], torch.zeros_like(direction)
        with self._network.at(self._moved(shift)):
            for chunk in self._chunks:
                moved.append(self._directional_derivative(chunk, self._parameters, direction))
                gradient = torch.cat([part.flatten() for part in self._gradients_of(chunk, of_residual=True)])
                total += hessian_product(gradient, self._parameters, direction)
        return torch.cat(moved), total

    def _outputs_at(self, shift: Tensor) -> Tensor:
        with self._network.at(self._moved(shift)), torch.no_grad():
            return torch.cat([self._outputs_of(chunk) for chunk in self._chunks])

    def _gradient_at(self, shift: Tensor) -> Tensor:
        """Of the linear part of the quadratic model, at other parameters."""
        total = torch.zeros_like(shift)
        with self._network.at(self._moved(shift)):
            for chunk in self._chunks:
                parts = self._gradients_of(chunk, of_residual=True)
                total += torch.cat([part.detach().flatten() for part in parts])
        return total

    def _moved(self, shift: Tensor) -> list[Tensor]:
        sizes = [parameter.numel() for parameter in self._parameters]
        return [
            parameter.detach().flatten() + part
            for parameter, part in zip(self._parameters, torch.split(shift, sizes), strict=True)
        ]

    def check(self, curved: Sequence[bool]) -> None:
        """Refuse an operation of the network that can be differentiated only once, and does not say so."""
        # An expert, say, may be used by the inputs of some chunks only.
        connected = [False] * len(self._parameters)
        for chunk in self._chunks:
            gradients = self._gradients(chunk, of_residual=False)
            gradient = torch.cat([part.flatten() for part in gradients])
            connected = list(map(or_, connected, is_connected(gradient, self._parameters)))
        check_connected(connected, curved)

    def _gradients(self, chunk: Tensor, *, of_residual: bool) -> list[Tensor]:
        """Gradients of the quadratic model, or of its linear part, on some inputs; kept where they are all."""
        if of_residual in self._kept:
            return self._kept[of_residual]
        gradients = self._gradients_of(chunk, of_residual=of_residual)
        if len(self._chunks) == 1:
            self._kept[of_residual] = gradients
        return gradients

    def _gradients_of(self, chunk: Tensor, *, of_residual: bool) -> list[Tensor]:
        model = self._model(chunk, of_residual=of_residual)
        if not model.requires_grad:
            return [torch.zeros_like(parameter) for parameter in self._parameters]
        return list(torch.autograd.grad(model, self._parameters, create_graph=True, materialize_grads=True))

    def _outputs_of(self, chunk: Tensor) -> Tensor:
        is_whole = len(self._chunks) == 1
        with torch.backends.cudnn.flags(enabled=False):  # Its recurrent layers have no second derivative.
            outputs = self._network.outputs(self._probe if is_whole else self._probe.select(chunk))
        return self._seen(outputs.reshape(len(chunk), -1))

    def _model(self, chunk: Tensor, *, of_residual: bool) -> Tensor:
        """The quadratic model, or its linear part, of some inputs; of inputs that are coupled, as if to these alone."""
        outputs = self._outputs_of(chunk)
        model = (self._slope[chunk] * outputs).sum()
        if of_residual:
            return model
        moved = (outputs - self._outputs[chunk]).reshape(-1, 1)
        return model + 0.5 * (moved * weighted_rows(moved, self._blocks(chunk))).sum()

    @property
    def _is_coupled(self) -> bool:
        return self._curvature.matrices.shape[0] < self._slope.shape[0]

    def _blocks(self, chunk: Tensor) -> Tensor:
        matrices = self._curvature.matrices
        if not self._is_coupled:
            return matrices[chunk]
        rows = torch.arange(self._slope.numel(), device=chunk.device).view(self._slope.shape)[chunk].flatten()
        return matrices[:, rows][:, :, rows]


def check_finite(rows: Tensor, layers: Sequence[Layer]) -> None:
    """Refuse second derivatives that are not finite, by the layers in whose rows they stand."""
    parts = torch.split(rows, [layer.num_parameters for layer in layers])
    names = [layer.name for layer, part in zip(layers, parts, strict=True) if not bool(part.isfinite().all())]
    if names:
        raise RuntimeError(
            f"second derivatives must be finite, but are NaN or infinite in the layers {names}: keep square roots, "
            f"norms and powers below 2 away from 0"
        )


def num_activations(trace: Trace) -> int:
    """Count the elements of all tensors that left a layer."""
    return sum(tensor.numel() for left in trace.leaving.values() for tensor in left)
