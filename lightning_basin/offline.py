"""The same curves from the checkpoints of a run, after it or beside it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from tqdm import tqdm

from lightning_basin.callback.history import HistoryFile
from lightning_basin.callback.lightnings import CSVLogger, LightningModule, Logger, TensorBoardLogger
from lightning_basin.callback.loggers import log_scalars
from lightning_basin.callback.monitor import BasinMonitor
from lightning_basin.callback.report_file import write_page
from lightning_basin.callback.state import read_probe
from lightning_basin.history.page import page_name
from lightning_basin.layer_names import tag
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord

Paths = str | Path | Sequence[str | Path]


def measure_checkpoints(
    checkpoints: Paths,
    module: type[LightningModule] | Callable[[], nn.Module],
    monitor: BasinMonitor | None = None,
    *,
    log_dir: str | Path | None = None,
    loggers: Iterable[Logger] = (),
    device: torch.device | str = "cpu",
    weights_only: bool = True,
    progress: bool = True,
) -> list[BasinRecord]:
    """Measure the checkpoints of a run as a monitor in the run would have measured.

    Of several checkpoints of one step, one is measured. Of a run with averaged weights, those in training are measured,
    as in a run. A file that cannot be read is passed over, with a warning.

    Args:
        checkpoints: The checkpoints of Lightning's Trainer, or directories in which to look for ``*.ckpt``.
        module: The class of the LightningModule, which is built from the hyperparameters that it has saved; or a
            function that returns a module that takes the checkpoint's weights.
        monitor: The monitor whose arguments say what to measure; it stays as it is, and need not have been in the run.
            Without a probe in it, the probe is measured that a monitor of its prefix has left in the checkpoints.
            ``None`` means ``BasinMonitor()``.
        log_dir: The directory for TensorBoard's events, ``metrics.csv`` of Lightning's ``CSVLogger`` and
            ``<prefix>.jsonl``, with the keys and steps of a run, and a report.
        loggers: Further loggers.
        device: The device to measure on.
        weights_only: Whether ``torch.load`` refuses all but tensors and builtins. ``False`` runs code that a checkpoint
            brings along: only if you trust it.
        progress: Whether to show a progress bar.

    Returns:
        A record for each step that could be measured, in order.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        TypeError: If ``module`` is neither a class of modules nor a function that returns one.
        MisconfigurationException: If a module or its probe cannot be measured.
        RuntimeError: If the weights of a checkpoint do not fit into the module.
    """
    monitor = copy.deepcopy(monitor or BasinMonitor())
    run, session = monitor.progress, monitor.progress.session
    described = _find_checkpoints(checkpoints, monitor.checkpoint_key, weights_only=weights_only)
    outputs = list(loggers)
    if log_dir is not None:
        outputs += [logger(log_dir, name="", version="") for logger in (TensorBoardLogger, CSVLogger)]
    history = None if log_dir is None else HistoryFile(Path(log_dir) / f"{tag(monitor.prefix)}.jsonl")
    for index, checkpoint in enumerate(tqdm(described, desc="Measuring", unit="checkpoint", disable=not progress)):
        loaded = _load(checkpoint, module, weights_only=weights_only).to(device)
        if index == 0:
            holder = next((other for other in described if other.probe is not None), checkpoint)
            run.start(loaded, holder.probe, holder.step_calls)
            if history is not None:
                history.write([])
        record = run.observe(loaded, checkpoint.step)
        if record is None:
            continue
        for problem in log_scalars(
            outputs, session.log_values(record), step=checkpoint.log_step, prefix=monitor.prefix
        ):
            rank_zero_warn(problem)
        if history is not None:
            history.append(session.table_row(record))
    for logger in outputs:
        logger.finalize("success")
    if log_dir is not None and monitor.report and session.results.records:
        write_page(Path(log_dir) / page_name(monitor.prefix), session)
    return session.results.records


@dataclass(frozen=True)
class _Checkpoint:
    """What is known of a checkpoint without its weights."""

    path: Path
    step: int
    log_step: int
    probe: Probe | None
    step_calls: list[int] | None


def _find_checkpoints(checkpoints: Paths, state_key: str, *, weights_only: bool) -> list[_Checkpoint]:
    """Return every readable checkpoint, one for each step, in the order of steps."""
    sources = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    paths = sorted({path for source in sources for path in _paths(Path(source))})
    if not paths:
        raise FileNotFoundError(f"checkpoints must be files of Lightning, or directories with *.ckpt, got {sources}")
    by_step: dict[int, _Checkpoint] = {}
    left_out: dict[int, list[Path]] = {}
    for checkpoint in _readable(paths, state_key, weights_only=weights_only):
        if by_step.setdefault(checkpoint.step, checkpoint) is not checkpoint:
            left_out.setdefault(checkpoint.step, []).append(checkpoint.path)
    if not by_step:
        raise FileNotFoundError(f"none of {len(paths)} checkpoints can be read, {paths[0]} is the first")
    for step in sorted(left_out):
        # In another folder it may be of another run; ``last.ckpt`` beside the measured one holds the same weights.
        taken = by_step[step].path
        others = [str(path) for path in left_out[step] if path.parent != taken.parent]
        if others:
            rank_zero_warn(
                f"Of step {step}, {taken} is measured, and {', '.join(others)} left out. HINT: pass the folder of one "
                f"run alone"
            )
    return [by_step[step] for step in sorted(by_step)]


def _paths(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for inside in [path, *path.rglob("*.ckpt")]:
            if (inside / ".metadata").is_file():
                rank_zero_warn(
                    f"{inside} is left out: it is a sharded checkpoint. HINT: join its parts with `python -m "
                    f"lightning.pytorch.utilities.consolidate_checkpoint {inside}`"
                )
            elif inside.is_file():
                yield inside
    elif path.exists():
        yield path
    else:
        raise FileNotFoundError(f"there is no checkpoint {path}")


def _readable(paths: Iterable[Path], state_key: str, *, weights_only: bool) -> Iterator[_Checkpoint]:
    for path in paths:
        try:
            content = _read(path, weights_only=weights_only)
            yield _describe(path, content, state_key)
        except UnpicklingError as error:  # noqa: PERF203 - one file that cannot be read must not cost the others
            rank_zero_warn(
                f"{path} is left out: it holds objects that torch.load(weights_only=True) refuses. HINT: pass "
                f"weights_only=False if you trust where it comes from. {error}"
            )
        except Exception as error:  # A file that was cut off raises one error or another.
            rank_zero_warn(f"{path} is left out: it cannot be read. {type(error).__name__}: {error}")


def _read(path: Path, *, weights_only: bool) -> Mapping[str, Any]:
    # Mapped: which step it is and which probe it holds is known without reading the weights.
    content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    if not isinstance(content, Mapping) or not {"state_dict", "global_step"} <= content.keys():
        raise ValueError("a checkpoint of Lightning has a state_dict and a global_step; this file has not")
    return content


def _describe(path: Path, content: Mapping[str, Any], state_key: str) -> _Checkpoint:
    state = content.get("callbacks", {}).get(state_key)
    try:
        probe = None if state is None else read_probe(state)["probe"]
    except ValueError:  # Damaged, or of another version: the weights can be measured all the same.
        probe = None
    return _Checkpoint(
        path=path,
        step=content["global_step"],
        log_step=max(0, _batches_that_stepped(content) - 1),
        probe=probe,
        step_calls=None if state is None or probe is None else state.get("step_calls"),
    )


def _batches_that_stepped(content: Mapping[str, Any]) -> int:
    """Return Lightning's counter, which lags in a checkpoint that is saved before the end of a batch."""
    loop = content.get("loops", {}).get("fit_loop", {})
    manual = loop.get("epoch_loop.manual_optimization.optim_step_progress")
    if manual and manual["total"]["completed"]:  # Several optimizers may step in a batch.
        return int(loop["epoch_loop.batch_progress"]["total"]["processed"])
    return int(content["global_step"])


def _load(
    checkpoint: _Checkpoint, module: type[LightningModule] | Callable[[], nn.Module], *, weights_only: bool
) -> nn.Module:
    if isinstance(module, nn.Module) or not callable(module):
        raise TypeError(
            f"module must be the class of a LightningModule or a function that returns a module, got "
            f"{type(module).__name__}: pass type(module), or lambda: module"
        )
    content = _read(checkpoint.path, weights_only=weights_only)
    weights = content.get("current_model_state", content["state_dict"])  # Beside averaged ones, in lightning 2.6.
    loaded: Any  # What load_from_checkpoint returns has no type in lightning 2.6.
    if isinstance(module, type) and issubclass(module, LightningModule):
        loaded = module.load_from_checkpoint(checkpoint.path, map_location="cpu", weights_only=weights_only)
    else:
        loaded = module()
    if not isinstance(loaded, nn.Module):
        raise TypeError(f"module must return a module, got {type(loaded).__name__}")
    loaded.load_state_dict(weights)
    return loaded
