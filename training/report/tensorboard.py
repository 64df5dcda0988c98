"""Shows a run in TensorBoard: writes the scalars of metrics.jsonl as event files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from training.runs.record import METRICS_FILE, RECORD_KEYS, Record, read_lines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


def write_events(folder: Path) -> Path | None:
    """Writes a run's scalars to `folder`/tensorboard, in place of earlier ones, and returns that folder.

    Every number of a record becomes a point at the record's index and time. Its tag is its name, with the phase in
    front of a name that has no slash. Returns None if the tensorboard package is not installed, which is logged once.
    """
    open_writer = summary_writer()
    if not open_writer:
        return None
    events = folder / "tensorboard"
    for old in events.glob("events.out.tfevents.*"):
        old.unlink()
    with open_writer(str(events)) as writer:
        for record in read_lines(folder / METRICS_FILE).found:
            for tag, value in scalars(record):
                writer.add_scalar(tag, value, global_step=record["index"], walltime=record["time"])
    return events


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a record with their tags. Tables and text are left out."""
    for key, value in record.items():
        if key not in RECORD_KEYS and isinstance(value, int | float):
            yield key if "/" in key else f"{record['phase']}/{key}", float(value)


@cache
def summary_writer() -> type[SummaryWriter] | None:
    """Imports SummaryWriter, or returns None: training does not need TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        logger.info("no TensorBoard events are written: %s", error)
        return None
    return SummaryWriter
