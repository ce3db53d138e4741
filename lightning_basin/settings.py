"""What may be asked of a measurement, checked once."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_basin.checks import check_flag, check_function, check_number, is_number
from lightning_basin.functional.rank import check_rtol
from lightning_basin.limits import AUTO_ROWS, LEAST_PROBE_INPUTS, MAX_ROWS, MOST_PROBE_INPUTS, PROBE_ROWS
from lightning_basin.network.calls import LossFunction, ModuleBehavior, call_module
from lightning_basin.network.rounding import rounding_rtol
from lightning_basin.network.speed import has_slow_float64
from lightning_basin.probe import Probe

HESSIAN_MODES = ("auto", "dense", "bracket", "gauss-newton")

HessianMode = Literal["auto", "dense", "bracket", "gauss-newton", False]


@dataclass(frozen=True)
class Probabilities:
    """Probabilities as the behavior whose gradients count: the softmax over the second axis of a module's outputs.

    The loss still takes the outputs themselves.
    """

    outputs: ModuleBehavior = call_module


Behavior = ModuleBehavior | Probabilities | Literal["outputs", "probabilities"]

LayerSelection = Literal["auto", "all"] | Sequence[str]

Precision = Literal["float64", "float32"]
"""What a network is run and differentiated in; everything behind it is computed in float64."""

DType = Literal["auto"] | Precision
"""A precision, or the one that suits the device."""

DTYPES = {"float64": torch.float64, "float32": torch.float32}
"""Floating point types by the names that measurements take."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of a measurement. `measure_basin` says what each value means.

    Attributes:
        taken_dtype: The type that ``"auto"`` has taken; ``None`` where this is not known yet.
    """

    loss_fn: LossFunction | Literal["behavioral"] | None = None
    behavior: Behavior | None = None
    layers: LayerSelection = "all"
    hessian: HessianMode = "auto"
    rtol: float | None = None
    duplicate_rtol: float = 1e-6
    max_outputs: int | Literal["auto"] | None = None
    spectrum: bool = True
    memory_budget: int | None = None
    dtype: DType = "auto"
    taken_dtype: Precision | None = None
    seed: int = 0
    trained: Collection[str] = ()

    def __post_init__(self) -> None:
        check_function("loss_fn", self.loss_fn, "a function of outputs and targets", ["behavioral"])
        if not isinstance(self.behavior, Probabilities):
            check_function("behavior", self.behavior, "a function of module and inputs", ["outputs", "probabilities"])
        if self.hessian is not False and self.hessian not in HESSIAN_MODES:
            raise ValueError(f"hessian must be one of {HESSIAN_MODES} or False, got {self.hessian!r}")
        if not isinstance(self.layers, Sequence) or not all(isinstance(name, str) for name in self.layers):
            raise TypeError(f"layers must be 'auto', 'all' or a list of names of layers, got {self.layers!r}")
        if isinstance(self.trained, str) or not isinstance(self.trained, Collection):
            raise TypeError(f"trained must be a collection of names of parameters, got {self.trained!r}")
        check_flag("spectrum", self.spectrum)
        check_rtol(self.rtol)
        _check_precision(self.dtype, self.hessian, self.rtol)
        self._check_numbers()

    def _check_numbers(self) -> None:
        check_number("duplicate_rtol", self.duplicate_rtol, "inside [0, 1)", lambda rtol: 0.0 <= rtol < 1.0, kind=float)
        if isinstance(self.max_outputs, str) and self.max_outputs != "auto":
            raise ValueError(f"max_outputs must be a number, 'auto' or None, got {self.max_outputs!r}")
        if not isinstance(self.max_outputs, str | None) and not is_number(self.max_outputs, int):
            raise TypeError(f"max_outputs must be an integer, 'auto' or None, got {self.max_outputs!r}")
        if isinstance(self.max_outputs, int) and self.max_outputs < 1:
            raise ValueError(f"max_outputs must be at least 1, got {self.max_outputs}")
        if self.memory_budget is not None and not is_number(self.memory_budget, float):
            raise TypeError(f"memory_budget must be a number of bytes or None, got {self.memory_budget!r}")
        if self.memory_budget is not None and not math.isfinite(self.memory_budget):
            raise ValueError(
                f"memory_budget must be a finite number of bytes, got {self.memory_budget}: pass 2**60 for no limit"
            )
        check_number("seed", self.seed, "inside [-2**63, 2**64)", lambda seed: -(2**63) <= seed < 2**64)
        object.__setattr__(self, "seed", int(self.seed))  # Generators of torch take none of NumPy's integers.

    def on_device(self, device: torch.device) -> "Settings":
        """Return the settings of a measurement on a device, for which ``dtype="auto"`` has been decided."""
        return replace(self, taken_dtype=choose_dtype(self, device, is_slow=has_slow_float64))

    @property
    def precision(self) -> Precision:
        """The name of the floating point type in which the network is run and differentiated."""
        return (self.taken_dtype or "float64") if self.dtype == "auto" else self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """The floating point type in which the network is run and differentiated."""
        return DTYPES[self.precision]

    @property
    def loss(self) -> LossFunction | None:
        """The loss as a function of outputs and targets."""
        return behavioral_loss if isinstance(self.loss_fn, str) else self.loss_fn

    @property
    def outputs(self) -> ModuleBehavior | None:
        """The function that returns the module's outputs, which the loss takes; ``None`` calls the module."""
        if isinstance(self.behavior, Probabilities):
            return self.behavior.outputs
        return None if isinstance(self.behavior, str) else self.behavior

    @property
    def counts_probabilities(self) -> bool:
        """Whether the behavior is the softmax of the outputs."""
        return isinstance(self.behavior, Probabilities) or self.behavior == "probabilities"

    @property
    def planned_hessian(self) -> HessianMode:
        """How the Hessian will be measured; ``False`` where there is no loss, or float64 would be needed."""
        return self.hessian if self.loss_fn is not None and self.precision == "float64" else False

    @property
    def resolved_duplicate_rtol(self) -> float:
        """The tolerance within which two activations are the same, at least the rounding of the evaluation."""
        return (
            self.duplicate_rtol
            if self.precision == "float64"
            else max(self.duplicate_rtol, rounding_rtol(torch.float32))
        )

    def num_directions(self, num_inputs: int, num_outputs: int) -> int:
        """Return along how many directions the outputs of an input are seen: all, unless some are projected away.

        More outputs than one decomposition can take, and probabilities that would be left out, are refused.
        """
        directions = num_outputs
        if isinstance(self.max_outputs, int):
            directions = min(self.max_outputs, num_outputs)
        elif self.max_outputs == "auto" and num_inputs * num_outputs > MAX_ROWS:
            directions = max(1, AUTO_ROWS // num_inputs)
        if directions < num_outputs and self.counts_probabilities:
            raise ValueError(
                f"behavior='probabilities' needs all outputs, of which at most {MAX_ROWS} can be measured at once, and "
                f"cannot be combined with max_outputs: take a smaller probe"
            )
        if num_inputs * directions > MAX_ROWS:
            raise ValueError(
                f"at most {MAX_ROWS} outputs can be measured at once, got {num_inputs} inputs x {directions} outputs: "
                f"take a smaller probe, or pass max_outputs"
            )
        return directions

    def probe_size(self, num_outputs: int) -> int:
        """Return the number of inputs that ``probe="auto"`` takes, where each has some number of outputs."""
        if isinstance(self.max_outputs, int):
            num_outputs = min(self.max_outputs, num_outputs)
        if self.max_outputs == "auto" and LEAST_PROBE_INPUTS * num_outputs > AUTO_ROWS:
            return MOST_PROBE_INPUTS  # Whose outputs are so many that they are combined.
        return max(LEAST_PROBE_INPUTS, min(MOST_PROBE_INPUTS, PROBE_ROWS // num_outputs))

    def check_targets(self, probe: Probe) -> None:
        """Refuse a loss without targets."""
        if callable(self.loss_fn) and probe.targets is None:
            is_pair = isinstance(probe.inputs, tuple | list) and len(probe.inputs) == 2  # noqa: PLR2004
            raise ValueError(
                f"a loss_fn needs targets to compare the outputs with, got none: pass targets, or no loss_fn"
                f"{'; inputs is a pair: if it is one of inputs and targets, pass these apart' if is_pair else ''}"
            )


def choose_dtype(settings: Settings, device: torch.device, *, is_slow: Callable[[torch.device], bool]) -> Precision:
    """Decide in which floating point type a network is measured; what ``"auto"`` has taken before stays.

    ``is_slow`` says whether a device is slow in float64, and is called only where this decides.
    """
    if settings.dtype != "auto":
        return settings.dtype
    needs_hessian = settings.hessian not in ("auto", False)
    if needs_hessian or (settings.rtol is not None and settings.rtol < torch.finfo(torch.float32).eps):
        return "float64"
    if settings.taken_dtype is not None:
        return settings.taken_dtype
    return "float32" if device.type != "cpu" and is_slow(device) else "float64"


def behavioral_loss(outputs: Tensor, _: Any) -> Tensor:
    """Squared distance from the outputs as they are (Bushnaq et al., 2024): zero, with the Hessian 2 GᵀG."""
    return squared_distance(outputs, outputs.detach())


def squared_distance(outputs: Tensor, others: Tensor) -> Tensor:
    """Return the sum of squared differences, shape ``()``."""
    return (outputs - others).square().sum()


def _check_precision(dtype: DType, hessian: HessianMode, rtol: float | None) -> None:
    """Refuse a floating point type that no network is evaluated in, or that is too coarse for what is asked."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be one of {('auto', *DTYPES)}, got {dtype!r}")
    if dtype != "float32":
        return
    if hessian not in ("auto", False):
        raise ValueError(
            f"hessian must be 'auto' or False with dtype='float32', whose second derivatives do not resolve a null "
            f"space, got {hessian!r}"
        )
    epsilon = torch.finfo(torch.float32).eps
    if rtol is not None and rtol < epsilon:
        raise ValueError(
            f"rtol must be at least {epsilon:.1e} with dtype='float32', whose rounding that is, got {rtol}"
        )
