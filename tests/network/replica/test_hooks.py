from functools import partial

import pytest
import torch
from torch import nn

from lightning_basin.network.replica import replicas
from tests.network.replica.weights import filled


class Watcher:
    """An object outside of the network that refuses to be copied."""

    def __init__(self):
        self.calls = 0

    def __deepcopy__(self, memo):
        raise RuntimeError("a whole trainer")

    def note(self, module, args, output=None):
        self.calls += 1

    def double(self, module, args, output):
        return 2 * output


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_of_an_outside_object_is_one_of_its_copy(register):
    module, watcher = nn.Sequential(nn.Linear(1, 1)), Watcher()
    getattr(module[0], register)(watcher.note)
    (replica,) = replicas(module)
    replica(torch.ones(1, 1, dtype=torch.float64))
    assert watcher.calls == 0


def test_a_hook_that_changes_the_output_acts_on_the_replica_too():
    module = filled(nn.Linear(1, 1))
    module.register_forward_hook(Watcher().double)
    (replica,) = replicas(module)
    inputs = torch.ones(1, 1)
    torch.testing.assert_close(replica(inputs.double()).item(), module(inputs).item(), rtol=1e-6, atol=0.0)


class Forgetting(nn.Module):
    """The identity forward, with a backward hook that lets no gradient through, and one that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_hook(lambda module, inwards, outwards: (torch.zeros_like(inwards[0]),))
        self.register_full_backward_pre_hook(Watcher().note)

    def forward(self, inputs):
        return inputs * 1.0


def test_backward_hooks_are_left_out():
    module = nn.Sequential(nn.Linear(1, 1), Forgetting())
    (replica,) = replicas(module)
    inputs = torch.full((1, 1), 3.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(replica(inputs).sum(), [replica[0].weight])
    assert gradient.item() == 3.0
    assert (len(module[1]._backward_hooks), len(module[1]._backward_pre_hooks)) == (1, 1)


def test_hooks_added_to_the_replica_are_not_on_the_original():
    module = nn.Linear(1, 1)
    module.register_forward_hook(Watcher().note)
    (replica,) = replicas(module)
    replica.register_forward_hook(Watcher().note)
    replica.register_forward_pre_hook(Watcher().note)
    assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == (1, 0)


class CallableWatcher(Watcher):
    def __call__(self, module, args, output):
        self.calls += 1


class OuterModule(nn.Module):
    def note(self, module, args, output):
        pass

    def __deepcopy__(self, memo):
        raise RuntimeError("a whole trainer")


UNCOPYABLE_HOOKS = {
    "partial": lambda: partial(Watcher.note, Watcher()),
    "callable object": CallableWatcher,
    "method of a module outside": lambda: OuterModule().note,
}


@pytest.mark.parametrize("kind", UNCOPYABLE_HOOKS)
def test_hooks_added_to_the_replica_are_not_on_an_original_whose_hooks_cannot_be_copied(kind):
    module = nn.Linear(1, 1)
    module.register_forward_hook(UNCOPYABLE_HOOKS[kind]())
    (replica,) = replicas(module)
    replica.register_forward_hook(Watcher().note)
    assert len(module._forward_hooks) == 1
