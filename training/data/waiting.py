"""What the trainer last counted of the new rankings, on disk, where `alignd status` reads it: both say one figure."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from feedback.durable import write_json
from training.data.census import reason_in_words

logger = logging.getLogger(__name__)

_FILE = "rankings_counted.json"


@dataclass(frozen=True)
class Counted:
    """How many of the rankings after `seen` a run would learn from, and why it would leave out the others.

    Neither a ranking that another one supersedes, nor one without its sample, is in `left_out`.
    """

    seen: int
    count: int
    left_out: Mapping[str, int]

    def sentence(self, enough: int) -> str:
        """Returns in words how many would be learned from, of how many that begin a run, and why others are not."""
        said = f"{self.count}{' or more' if self.count >= enough else ''} to learn from"
        reasons = sorted(self.left_out, key=lambda reason: -self.left_out[reason])
        why = ", ".join(f"{self.left_out[reason]} {reason_in_words(reason)}" for reason in reasons)
        return f"{said}; {enough} begin a run" + (f"; {sum(self.left_out.values())} left out: {why}" if why else "")


def tell(runs_dir: Path, counted: Counted, enough: int) -> None:
    """Says it in the trainer's log, and to `alignd status`. If the disk is full, the trainer goes on without that."""
    logger.info("new rankings: %s", counted.sentence(enough))
    try:
        write_json(runs_dir / _FILE, asdict(counted))
    except OSError as error:
        logger.warning("`alignd status` will not know the count of new rankings: %s", error)


def read_counted(runs_dir: Path, seen: int) -> Counted | None:
    """Returns what the trainer has counted after this ranking; None if it has not counted since."""
    try:
        found = Counted(**json.loads((runs_dir / _FILE).read_text()))
    except (OSError, ValueError, TypeError):
        # It is not there, or a release that counts otherwise has written it.
        return None
    return found if found.seen == seen else None
