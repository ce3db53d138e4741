"""What goes into the event files of TensorBoard: values and details of a measurement, and the end of a run.

All values of a measurement are one event, as each event costs a tenth of a millisecond and more.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, HistogramProto, Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_basin.callback.lightnings import TENSORBOARD_LOGGERS, Logger
from lightning_basin.functional.rank import BINS_PER_DECADE
from lightning_basin.history.details import DETAILS, details_of
from lightning_basin.history.spectra import Counts
from lightning_basin.keys import FIRST_QUANTITIES
from lightning_basin.layer_names import MAX_LAYER_CURVES, tags_of
from lightning_basin.naming import escaped
from lightning_basin.record import BasinRecord

_ALL_WRITTEN = 32
"""The number of measurements whose singular values are all written: TensorBoard shows some fifty of a run."""


def tensorboard_loggers(loggers: Iterable[Logger]) -> list[Any]:
    """Return the loggers that write event files by torch's own writer into a local folder."""
    return [
        logger
        for logger in loggers
        if isinstance(logger, TENSORBOARD_LOGGERS)
        and "://" not in logger.log_dir
        and isinstance(logger.experiment, SummaryWriter)
    ]


def write_scalars(logger: Any, values: Mapping[str, float], *, step: int) -> None:
    """Write values, each under its tag; a logger of a class of the user's logs them as it does all others."""
    if type(logger) in TENSORBOARD_LOGGERS and isinstance(logger.experiment, SummaryWriter):
        add_values(logger.experiment, with_prefix(logger, values), step=step)
    else:
        logger.log_metrics(dict(values), step=step)


def add_values(writer: SummaryWriter, values: Mapping[str, float], *, step: int) -> None:
    """Add values by tag to a file of events, as one event."""
    _add(writer, [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()], step)


def prefix_of(logger: Any) -> str:
    """Return what a TensorBoard logger writes in front of each tag."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""  # As of lightning 2.4 - 2.6.


def with_prefix(logger: Any, values: Mapping[str, float]) -> dict[str, float]:
    """Return values under the tags that a TensorBoard logger gives them."""
    return {f"{prefix_of(logger)}{tag}": value for tag, value in values.items()}


def is_spectrum_written(index: int) -> bool:
    """Whether the singular values of a measurement are written, by its index in the run: ever fewer of later ones.

    Example:
        >>> sum(is_spectrum_written(index) for index in range(1000))
        112
    """
    return index % (1 << max(0, (index // _ALL_WRITTEN).bit_length())) == 0


def write_spectra(logger: Any, record: BasinRecord, prefix: str, *, step: int) -> None:
    """Write the singular values of the network, and of up to 32 layers or blocks, as histograms of ``log10``."""
    scopes = record.blocks or record.layers
    named = {f"{escaped(prefix)}_spectrum/network": record.gradient_spectrum}
    if len(scopes) <= MAX_LAYER_CURVES:
        named |= {
            f"{escaped(prefix)}_layer_spectrum/{tag}": scopes[name].gradient_spectrum
            for name, tag in tags_of(scopes).items()
        }
    found = [Summary.Value(tag=tag, histo=_histogram(counts)) for tag, counts in named.items() if counts]
    if found:
        _add(logger.experiment, found, step)


def write_details(logger: Any, record: BasinRecord, prefix: str, *, step: int) -> None:
    """Write what no value says, for reports from event files. No pane of TensorBoard shows it."""
    text = json.dumps(details_of(record), separators=(",", ":"))
    plugin = SummaryMetadata.PluginData(plugin_name="lightning_basin")
    (tag,) = with_prefix(logger, {f"{escaped(prefix)}/{DETAILS}": 0.0})
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    _add(logger.experiment, [Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(text))], step)


def _histogram(counts: Counts) -> HistogramProto:
    """Counts between the edges of quarters of a decade, which are the same in all histograms."""
    bins = range(min(counts), max(counts) + 1)
    return HistogramProto(
        min=bins.start / BINS_PER_DECADE,
        max=bins.stop / BINS_PER_DECADE,
        num=sum(counts.values()),
        bucket_limit=[(b + 1) / BINS_PER_DECADE for b in bins],
        bucket=[counts.get(b, 0) for b in bins],
    )


def write_end_values(logger: Any, values: Mapping[str, float], prefix: str, *, step: int) -> None:
    """Let TensorBoard compare runs by hyperparameters and by what they ended with, where this takes no one's place.

    Of all such records of a run only the first counts, and ``TensorBoardLogger(default_hp_metric=False)`` alone leaves
    it to others.
    """
    if logger._default_hp_metric or _has_end_values(logger):
        return
    parameters = {
        name: value if isinstance(value, str | int | float) else str(value) for name, value in logger.hparams.items()
    }
    first = [f"{escaped(prefix)}/{quantity}" for quantity in FIRST_QUANTITIES]
    ends = with_prefix(logger, {tag: values[tag] for tag in first if tag in values})
    for summary in hparams(parameters, ends):  # type: ignore[no-untyped-call]
        logger.experiment._get_file_writer().add_summary(summary, step)


def _has_end_values(logger: Any) -> bool:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # Loading it takes a second.

    logger.experiment.flush()
    summaries = EventAccumulator(logger.log_dir, size_guidance={"scalars": 1, "images": 1, "histograms": 1}).Reload()
    try:
        return bool(summaries.PluginTagToContent("hparams"))
    except KeyError:
        return False


def _add(writer: SummaryWriter, values: list[Summary.Value], step: int) -> None:
    # As Lightning's logger does.
    writer._get_file_writer().add_summary(Summary(value=values), step)  # type: ignore[no-untyped-call]
