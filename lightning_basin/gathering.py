"""A module whose parameters are sharded over processes, put together again on one of them."""

import copy

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


class GatheredModule:
    """A copy of a module from before its parameters were sharded, filled from all shards whenever it is asked for.

    A sharded module itself cannot be measured: `torch.func.functional_call` on it returns the outputs of its own
    parameters without a word, and its derivatives by what one passes are zero (torch 2.13).

    Args:
        module: Not sharded yet. The copy is in float64, which holds any precision that training may choose.
        is_here: Whether this is the process that holds the copy.
    """

    def __init__(self, module: nn.Module, *, is_here: bool) -> None:
        self._copy = copy.deepcopy(module).double() if is_here else None

    def gathered(self, sharded: nn.Module) -> nn.Module | None:
        """The copy with the weights, buffers and plain attributes as they are now; all processes must call this.

        Args:
            sharded: What became of the module.

        Returns:
            ``None`` on a process that holds no copy.

        Raises:
            ValueError: If parameters or buffers were added, removed or renamed since the copy was made.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(sharded, options=options)
        if self._copy is None:
            return None
        own = self._copy.state_dict()
        if own.keys() != state.keys():
            differing = sorted(own.keys() ^ state.keys())
            raise ValueError(
                f"the parameters and buffers of a sharded module must be those that it was made with, but "
                f"{differing} came or went in `configure_model`"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        _take_over_what_is_whole(sharded, self._copy)
        return self._copy


def _take_over_what_is_whole(sharded: nn.Module, replica: nn.Module) -> None:
    """What every process has of a sharded module, and no state dict: some buffers, flags, plain attributes."""
    parts, buffers, parameters = (
        dict(found) for found in (sharded.named_modules(), sharded.named_buffers(), sharded.named_parameters())
    )
    for name, buffer in replica.named_buffers():
        buffer.copy_(buffers[name])
    for name, parameter in replica.named_parameters():
        parameter.requires_grad_(parameters[name].requires_grad)
    for name, part in replica.named_modules():
        now = vars(parts[name])
        for attribute, value in vars(part).items():
            if isinstance(value, bool | int | float | str) and attribute in now:
                vars(part)[attribute] = now[attribute]
