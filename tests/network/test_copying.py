"""Whatever a module holds, a measurement of its copy changes nothing in it."""

import gc
import queue
import tempfile
import threading
import types
import weakref
from functools import lru_cache, partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_basin import BasinMonitor
from lightning_basin.network.copying import DeepCopier
from lightning_basin.network.replica import replicas
from tests.lightning_packages import Callback, CSVLogger, Trainer
from tests.training import Eventful, make_trainer, regression_data, steps, witnessed


def copied(item):
    return DeepCopier().copy(item)


class KeepsInNamespace(Eventful):
    """Keeps an activation with its graph, in training and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = types.SimpleNamespace(hidden=None)

    def forward(self, inputs):
        outputs = super().forward(inputs)
        self.memory.hidden = outputs.mean()
        return outputs

    @property
    def noted(self):
        hidden = self.memory.hidden
        return None if hidden is None else (hidden, type(hidden.grad_fn).__name__)


class LockedCounter:
    def __init__(self) -> None:
        self.lock, self.number = threading.Lock(), 0

    def count(self) -> None:
        with self.lock:
            self.number += 1


class CountsUnderLock(Eventful):
    def __init__(self) -> None:
        super().__init__()
        self.counter, self.waiting = LockedCounter(), queue.Queue()

    def forward(self, inputs):
        self.counter.count()
        self.waiting.put(inputs.mean())
        return super().forward(inputs)

    @property
    def noted(self):
        return self.counter.number, self.waiting.qsize()


class CountingLoss:
    def __init__(self) -> None:
        self.number = 0

    def __call__(self, outputs, targets):
        self.number += 1
        return nn.functional.mse_loss(outputs, targets)


class LossObject(Eventful):
    def __init__(self) -> None:
        super().__init__()
        self.counting = CountingLoss()
        del self.loss_fn  # A module, whose place only a module can take.
        self.loss_fn = self.wrapped(self.counting)

    wrapped = staticmethod(lambda loss: loss)

    @property
    def noted(self):
        return self.counting.number


class LossMethod(LossObject):
    wrapped = staticmethod(lambda loss: loss.__call__)


class LossPartial(LossObject):
    wrapped = staticmethod(partial)


class Itself(nn.Module):
    """Refuses to be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(2, affine=False), 0

    def forward(self, inputs):
        self.calls += 1
        return self.norm(inputs)

    def __deepcopy__(self, memo):
        return self


class HoldsItself(Eventful):
    def __init__(self) -> None:
        super().__init__()
        self.itself = Itself()

    def forward(self, inputs):
        return self.itself(super().forward(inputs))

    @property
    def noted(self):
        return self.itself.calls


class HiddenTeacher(Eventful):
    """A module that is no part of it, cannot be copied as it is, and is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.teachers = [Itself()]
        self.teachers[0].lock = threading.Lock()

    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs + 0.0 * self.teachers[0](outputs.detach())

    @property
    def noted(self):
        return self.teachers[0].calls, self.teachers[0].norm.state_dict()


class Extractor:
    """Keeps what left a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.features: list[torch.Tensor] = []
        layer.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.features.append(output.mean().detach())


class OutsideHook(Eventful):
    def __init__(self) -> None:
        super().__init__()
        self.extractor = Extractor(self.hidden)

    @property
    def noted(self):
        return self.extractor.features


class HooksOfItself(Eventful):
    """Hooks that lead back by a closure, a partial method, and a method of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = []
        self.hidden.register_forward_hook(lambda module, args, output: self.noted.append(output.mean().detach()))
        self.hidden.register_forward_hook(partial(self.note, "hidden"))
        add = self.noted.append
        self.readout.register_forward_pre_hook(lambda module, args: add(args[0].mean().detach()))

    def note(self, name, module, args, output):
        self.noted.append(name)


class Lambdas(Eventful):
    """Functions of itself, with no trainable parameter behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.BatchNorm1d(2, affine=False)
        self.number = 0
        self.steps = {"normalize": lambda outputs: self.normal(outputs), "count": self.counted}
        self.scale = lru_cache(None)(self.counted_scale)

    def counted(self, outputs):
        self.number += 1
        return outputs

    def counted_scale(self, factor):
        self.number += 100
        return factor * self.readout.weight.detach().abs().max()

    def forward(self, inputs):
        self.scale.cache_clear()
        outputs = super().forward(inputs) * self.scale(2.0)
        return self.steps["count"](self.steps["normalize"](outputs))

    @property
    def noted(self):
        return self.number, self.scale.cache_info().misses


class Head(nn.Module):
    """Counts and logs with the module that it is a part of."""

    def __init__(self, parent) -> None:
        super().__init__()
        self.linear, self.parent = nn.Linear(3, 2), weakref.ref(parent)
        vars(self)["proxy"] = weakref.proxy(parent)  # It would be taken for a child.

    def forward(self, inputs):
        self.proxy.head_calls += 1
        self.parent().log("entering", inputs.mean())
        return self.linear(inputs)


class WeakParent(Eventful):
    def __init__(self) -> None:
        super().__init__()
        self.head_calls = 0
        self.head = Head(self)

    def forward(self, inputs):
        return super().forward(inputs) + self.head(inputs)

    @property
    def noted(self):
        return self.head_calls


class LogsPast(Eventful):
    """Logs without asking Lightning, and sets what it likes in the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = None

    def forward(self, inputs):
        self.logger.log_metrics({"entering": float(inputs.mean())}, step=self.global_step)
        self.trainer.loggers[0].experiment.log_metrics({"entered": 1.0}, step=self.global_step)
        self.trainer.forward_passes = getattr(self.trainer, "forward_passes", 0) + 1
        assert isinstance(self.trainer, Trainer)
        return super().forward(inputs)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        rows = self.logger.experiment.metrics
        self.noted = self.trainer.forward_passes, [row for row in rows if {"entering", "entered"} & set(row)]


class WithCallback(Eventful):
    """Has a callback with a hook that logs."""

    def configure_callbacks(self):
        return [LogsFeatures()]


class LogsFeatures(Callback):
    def on_fit_start(self, trainer, pl_module):
        self.num_features = 0
        pl_module.hidden.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        self.num_features += 1
        self.log("features", output.mean())

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.noted = self.num_features


HOLDING = [
    *(KeepsInNamespace, CountsUnderLock, LossObject, LossMethod, LossPartial, HoldsItself, HiddenTeacher),
    *(OutsideHook, HooksOfItself, Lambdas, WeakParent, LogsPast, WithCallback),
]


@pytest.mark.fits
@pytest.mark.parametrize("make_module", HOLDING)
def test_training_is_the_same_whatever_a_module_holds(tmp_path, make_module):
    monitor = BasinMonitor(probe=20, every_n_train_steps=3)
    alone, watched = (
        witnessed(tmp_path, *monitors, make_module=make_module, max_epochs=1, logger=CSVLogger(tmp_path / name))
        for name, monitors in (("alone", []), ("watched", [monitor]))
    )
    assert watched == alone
    assert steps(monitor) == [0, 3, 6]
    assert monitor.records[-1].loss is not None


def test_a_lock_is_shared_and_what_holds_it_is_not():
    counter = LockedCounter()
    duplicate = copied(counter)
    duplicate.count()
    assert (duplicate.lock is counter.lock, duplicate.number, counter.number) == (True, 1, 0)


def test_a_condition_of_a_copy_knows_nobody_who_waits():
    condition = threading.Condition()
    with condition:
        condition._waiters.append("somebody")
    assert list(copied(condition)._waiters) == []


def test_functions_that_share_a_variable_share_it_in_the_copy():
    number = 0

    def count():
        nonlocal number
        number += 1

    def counted():
        return number

    new_count, new_counted = copied((count, counted))
    new_count()
    assert (new_counted(), counted()) == (1, 0)


def test_a_function_that_calls_itself_is_copied():
    names = []

    def walk(item):
        names.append(item)
        return walk(item - 1) if item else len(names)

    assert (copied(walk)(2), names) == (3, [])


def test_what_leads_back_to_the_set_that_holds_it_does_so_in_the_copy():
    holder = Extractor(nn.Linear(1, 1))
    holder.siblings = {holder}
    duplicate = copied(holder.siblings)
    (member,) = duplicate
    assert member is not holder
    assert member.siblings is duplicate


def test_a_default_that_can_change_is_copied():
    kept = []
    duplicate = copied(lambda item, kept=kept: kept.append(item))
    duplicate(1)
    assert kept == []


@pytest.mark.parametrize("function", [len, torch.relu, nn.functional.mse_loss, replicas, [].__class__.append])
def test_functions_without_a_state_stay(function):
    assert copied(function) is function


def test_a_method_of_a_list_is_one_of_the_copy():
    calls = []
    copied(calls.append)(1)
    assert calls == []


def test_weak_collections_hold_copies():
    key, value = nn.Linear(1, 1), nn.Linear(1, 1)
    copier = DeepCopier()
    by_key, by_name, elements = copier.copy(
        (weakref.WeakKeyDictionary({key: 1}), weakref.WeakValueDictionary({"value": value}), weakref.WeakSet([key]))
    )
    assert (list(by_key), list(elements)) == ([copier.copy(key)], [copier.copy(key)])
    assert by_name["value"] is copier.copy(value) is not value


def test_what_only_a_weak_reference_leads_to_lives_as_long_as_the_replica():
    parent, child = nn.Linear(1, 1), nn.Linear(1, 1)
    vars(child)["parent"] = weakref.ref(parent)
    (replica,) = replicas(child)
    gc.collect()
    assert replica.parent().weight.dtype == torch.float64
    assert replica.parent() is not parent


class Closing:
    """Releases something when it is collected."""

    closed = 0

    def __del__(self):
        type(self).closed += 1


def test_a_finalizer_is_not_run_for_a_copy():
    module = nn.Linear(1, 1)
    module.handle = Closing()
    replicas(module)
    gc.collect()
    assert Closing.closed == 0


@pytest.mark.fits
def test_data_sets_optimizers_and_what_makes_a_run_are_shared(tmp_path):
    module = nn.Linear(1, 1)
    held = [
        TensorDataset(torch.zeros(1)),
        torch.optim.SGD(module.parameters()),
        Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path),
        threading.current_thread(),
    ]
    with tempfile.TemporaryFile() as file:
        held.append(file)
        assert all(new is old for new, old in zip(copied(held), held, strict=True))


class PartiallyItself(nn.Module):
    """Copies itself, but not its part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(1, 1)

    def __deepcopy__(self, memo):
        duplicate = PartiallyItself()
        duplicate.part = self.part
        return duplicate


def test_a_copy_of_a_module_that_shares_a_part_is_made_anew():
    module = nn.Sequential(PartiallyItself())
    (replica,) = replicas(module)
    assert replica[0].part is not module[0].part
    assert replica[0].part.weight.dtype == torch.float64


SHARED = nn.Linear(1, 1)


class Returning(nn.Linear):
    """Lets a part of the original slip into the copy when it is set up."""

    def __setstate__(self, state):
        super().__setstate__(state)
        self.part = SHARED


def test_a_copy_that_gets_hold_of_a_part_of_the_original_is_refused():
    module = Returning(1, 1)
    module.part = SHARED
    with pytest.raises(TypeError, match="Returning must be copied, but a copy of it shares its Linear"):
        replicas(module)


class RunsTheOriginal(Eventful):
    """Finds itself through the trainer."""

    def forward(self, inputs):
        if self.training or self._trainer is None:
            return super().forward(inputs)
        return self.trainer.lightning_module.readout(inputs[:, :1].expand(-1, 4))


@pytest.mark.fits
def test_a_module_that_is_found_through_the_trainer_is_refused_before_the_first_step(tmp_path):
    module = RunsTheOriginal()
    trainer = make_trainer(tmp_path, BasinMonitor(probe=20))
    with pytest.raises(Exception, match="the submodule 'readout' itself is run, found in a global variable or through"):
        trainer.fit(module, torch.utils.data.DataLoader(regression_data(), 20))
    assert trainer.global_step == 0
