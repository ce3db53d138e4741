"""Behavioral gradients of any function of named parameters, one dense row per output."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import jacrev, vmap

Behavior = Callable[[Mapping[str, Tensor], Sequence[Tensor]], Tensor]
"""Maps parameters by name and a batch, tensors with n inputs along their first axis, to outputs ``(n, ...)``."""

_CHUNK_ELEMENTS = 2**23  # float64 elements of a temporary: 64 MiB


def behavioral_gradients(behavior: Behavior, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The Jacobian of all outputs on all inputs with respect to all parameters.

    Each input is differentiated on its own, all inputs of a chunk at once.

    Args:
        behavior: The function; row i of its result may depend on input i only.
        parameters: The parameters, in the order of the columns.
        inputs: One or more tensors with the k inputs along their first axis.

    Returns:
        Row ``(x, j)`` is the gradient of output j on input x, shape ``(k * c, N)``.

    Raises:
        ValueError: If there is no parameter or no input tensor.

    Example:
        Of ``w * x`` with respect to ``w``:

        >>> def behavior(parameters, inputs):
        ...     return parameters["w"] * inputs[0]
        >>> behavioral_gradients(behavior, {"w": torch.tensor(5.0)}, [torch.tensor([[1.0], [2.0]])])
        tensor([[1.],
                [2.]])
    """
    if not parameters or not inputs:
        raise ValueError(
            f"behavioral gradients need at least one parameter and one input tensor, "
            f"got {len(parameters)} and {len(inputs)}"
        )

    def outputs_of_one(values: Mapping[str, Tensor], one: Sequence[Tensor]) -> Tensor:
        return behavior(values, [tensor.unsqueeze(0) for tensor in one]).flatten()

    num_parameters = sum(parameter.numel() for parameter in parameters.values())
    with torch.no_grad():
        num_outputs = outputs_of_one(parameters, [tensor[0] for tensor in inputs]).numel()
    num_inputs = inputs[0].shape[0]
    # Twice, because the Jacobian of a chunk exists by parameter and then as one matrix.
    chunk = max(1, _CHUNK_ELEMENTS // max(1, 2 * num_outputs * num_parameters))
    jacobian = vmap(jacrev(outputs_of_one), in_dims=(None, 0))
    rows = []
    for start in range(0, num_inputs, chunk):
        with torch.no_grad():  # Else other parameters that require gradients would keep the graph alive.
            blocks = jacobian(dict(parameters), [tensor[start : start + chunk] for tensor in inputs])
        rows.append(torch.cat([block.reshape(*block.shape[:2], -1) for block in blocks.values()], dim=2).flatten(0, 1))
    return torch.cat(rows)


def gradient_rows(outputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Gradients of outputs that are already in a graph, one backward pass each.

    The slow way that works for every graph, whether its operations can be batched or not.

    Args:
        outputs: The outputs, attached to the graph of ``parameters``, any shape with m elements.
        parameters: The parameters, in the order of the columns.

    Returns:
        Shape ``(m, N)``; zero where an output does not depend on a parameter.

    Example:
        >>> w = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> gradient_rows(w.square(), [w])
        tensor([[4., 0.],
                [0., 6.]])
    """
    if not outputs.requires_grad:  # Of inputs on which no parameter is used.
        return outputs.new_zeros(outputs.numel(), sum(parameter.numel() for parameter in parameters))
    rows = []
    for output in outputs.flatten():
        gradients = torch.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def vector_jacobian_products(outputs: Tensor, variables: Sequence[Tensor], vectors: Tensor) -> Tensor:
    """Rows of ``vectors @ d(outputs)/d(variables)``, shape ``(n, N)``, batched where every operation allows it.

    Each of the n vectors has the shape of the outputs, whose graph stays. Rows are zero where the outputs do not depend
    on a variable.
    """

    def backward(vectors: Tensor, *, batched: bool) -> Tensor:
        parts = torch.autograd.grad(
            outputs, variables, vectors, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        batch = vectors.shape[: int(batched)]
        rows = [
            vectors.new_zeros(*batch, variable.numel()) if part is None else part.reshape(*batch, -1)
            for part, variable in zip(parts, variables, strict=True)
        ]
        return torch.cat(rows, dim=-1)

    try:
        return backward(vectors, batched=True).detach()
    except RuntimeError:  # Some operations (recurrent cells, custom functions) have no batching rule.
        return torch.stack([backward(vector, batched=False) for vector in vectors]).detach()


def weighted_rows(gradients: Tensor, blocks: Tensor) -> Tensor:
    """Combine the rows of each input: ``blocks[x] @ gradients`` of input x, shape ``(m', N)``.

    Args:
        gradients: Rows ordered by input, then output, shape ``(m, N)``.
        blocks: The weights, shape ``(k, c', c)``, or ``(1, m', m)``.

    Example:
        >>> weighted_rows(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.ones(2, 1, 2))
        tensor([[3.],
                [7.]])
    """
    columns = gradients.shape[1]
    return (blocks @ gradients.view(blocks.shape[0], blocks.shape[2], columns)).view(-1, columns)
