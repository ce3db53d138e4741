"""The singular values of a scope over the steps of a run, as counts by quarters of a decade."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_basin.record import LayerRecord

Counts = Mapping[int, int]
"""The number of singular values in ``[10**(b / 4), 10**((b + 1) / 4))`` by the integer b."""


@dataclass(frozen=True)
class SpectrumHistory:
    """The singular values of a scope at each measurement of a run.

    Attributes:
        counts: The singular values of each measurement; ``None`` where there are none.
        cuts: ``log10`` of the value up to which a singular value counts as zero, ``rtol * sigma_max``; ``None`` where
            it is not known.
    """

    counts: Sequence[Counts | None]
    cuts: Sequence[float | None]

    @property
    def measured(self) -> list[int]:
        """The indices of the measurements with singular values, ascending."""
        return [index for index, counts in enumerate(self.counts) if counts]

    def table(self) -> tuple[NDArray[np.int64], int]:
        """Return the counts of the measurements that have any as a table, with a row for each quarter of a decade.

        Returns:
            The counts, shape ``(rows, len(self.measured))``, from the smallest values up, and b of the first row.
        """
        columns = [dict(self.counts[index] or {}) for index in self.measured]
        first, last = min(map(min, columns)), max(map(max, columns))
        return np.array([[column.get(b, 0) for column in columns] for b in range(first, last + 1)]), first

    def to_dict(self) -> dict[str, Any]:
        """Return builtins for JSON: of each measurement b of the first count, and all counts from there on."""
        return {
            "counts": [None if counts is None else _dense(counts) for counts in self.counts],
            "cuts": [None if cut is None else round(cut, 3) for cut in self.cuts],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "SpectrumHistory":
        """Read what `to_dict` wrote."""
        return cls([None if dense is None else _sparse(*dense) for dense in plain["counts"]], plain["cuts"])


def spectrum_history(records: Iterable[LayerRecord | None]) -> SpectrumHistory | None:
    """Collect the singular values of a scope; ``None`` where no measurement has any."""
    records = list(records)
    counts = [None if record is None else record.gradient_spectrum for record in records]
    if not any(counts):
        return None
    return SpectrumHistory(counts, [_cut(record) for record in records])


def _cut(record: LayerRecord | None) -> float | None:
    """The logarithm of the tolerance; none for a matrix of zeros."""
    return math.log10(record.gradient_rtol * record.gradient_largest) if record and record.gradient_largest else None


def _dense(counts: Counts) -> list[int]:
    if not counts:
        return []
    first = min(counts)
    return [first, *(counts.get(b, 0) for b in range(first, max(counts) + 1))]


def _sparse(first: int = 0, *dense: int) -> Counts:
    return {b: count for b, count in enumerate(dense, start=first) if count}
