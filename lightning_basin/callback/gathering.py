"""A module whose parameters are sharded over processes, put together again on one of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_basin.network.replica import replicas

_OFFLINE = "HINT: measure the checkpoints: `lightning_basin.measure_checkpoints`"


class GatheredModule:
    """A copy of a module from before its parameters were sharded, filled from all shards whenever it is asked for.

    A sharded module itself cannot be measured: `torch.func.functional_call` on it returns the outputs of its own
    parameters without a word, and its derivatives by what one passes are zero (torch 2.13).
    """

    def __init__(self, module: nn.Module, *, is_here: bool) -> None:
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"a sharded module must be made with numbers in its parameters, not on the meta device. {_OFFLINE}"
            )
        self._copy: nn.Module | None = None
        if is_here:
            (self._copy,) = replicas(module)

    def gathered(self, sharded: nn.Module) -> Callable[[], nn.Module]:
        """Collect weights and buffers as they are now; all processes must call this together.

        The returned function fills the copy, on the process that holds it.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return partial(self._filled, sharded, get_model_state_dict(sharded, options=options))

    def _filled(self, sharded: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        assert self._copy is not None, "only one process holds the copy"
        copied = self._copy.state_dict()
        if copied.keys() != state.keys():
            raise ValueError(
                f"the parameters and buffers of a sharded module must be those that it was made with, but "
                f"{sorted(copied.keys() ^ state.keys())} came or went in `configure_model`. {_OFFLINE}"
            )
        with torch.no_grad():
            for name, tensor in copied.items():
                tensor.copy_(state[name])
        _take_over_what_is_whole(sharded, self._copy)
        return self._copy


def _take_over_what_is_whole(sharded: nn.Module, replica: nn.Module) -> None:
    """Copy what every process has of a sharded module, and no state dict: some buffers, flags, plain attributes."""
    submodules, buffers, parameters = (
        dict(named) for named in (sharded.named_modules(), sharded.named_buffers(), sharded.named_parameters())
    )
    for name, buffer in replica.named_buffers():
        buffer.copy_(buffers[name])
    for name, parameter in replica.named_parameters():
        parameter.requires_grad_(parameters[name].requires_grad)
    for name, submodule in replica.named_modules():
        now = vars(submodules[name])
        for attribute, value in vars(submodule).items():
            if isinstance(value, bool | int | float | str) and attribute in now:
                vars(submodule)[attribute] = now[attribute]
