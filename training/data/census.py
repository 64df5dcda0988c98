"""Counts what a run read, and says in words what became of it: learned from, measured with, or left out and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from training.runs.folder import RunFolder
from training.runs.record import METRICS, Record

logger = logging.getLogger(__name__)

RANKINGS, PROMPTS, DEMONSTRATIONS = KINDS = ("rankings", "prompts", "demonstrations")
NO_SAMPLE, SUPERSEDED, OLDER = "no_sample", "superseded", "older"
HELD_OUT_IN_PART, SPANS_SWAP, NO_COMPARISON = "held_out_in_part", "spans_swap", "no_comparison"
HELD_OUT = "held_out"  # of rankings that wait for a run; the run measures with them
NOT_RENDERED, PROMPT_TOO_LONG, TOO_LONG = "not_rendered", "prompt_too_long", "too_long"

_MOST_NAMED = 5
_MOST_WHY = 200  # characters of an error


@dataclass(frozen=True)
class LeftOut:
    """Why something was left out."""

    reason: str
    why: str = ""
    """The error, if there was one."""


@dataclass(frozen=True)
class Census:
    """How many of one kind were read, and what became of them: `num_read` is the sum of all the rest."""

    kind: str
    num_read: int
    num_learned: int
    num_measured: int
    left_out: Mapping[str, int]
    """How many were left out, by reason."""
    unrendered: str = ""
    """The first few samples whose prompt or completions could not be turned into tokens, each with the error."""
    num_shortened: int = 0
    """Rankings that were used without their longest completions."""
    num_off_distribution: int = 0
    """Rankings that were used though their samples were drawn otherwise than PPO draws."""

    def with_unread(self, **reasons: int) -> Census:
        """Returns the census with what the store left out, by reason."""
        return replace(
            self, num_read=self.num_read + sum(reasons.values()), left_out={**self.left_out, **_some(reasons)}
        )

    def figures(self) -> dict[str, float | str]:
        """Returns the counts by the names that they have in metrics.jsonl; reasons that left out nothing are not named.

        `unrendered` is among them if there is any.
        """
        found: dict[str, float | str] = {
            f"{self.kind}/read": self.num_read,
            f"{self.kind}/learned": self.num_learned,
            f"{self.kind}/measured": self.num_measured,
            **{f"{self.kind}/left_out/{reason}": count for reason, count in self.left_out.items()},
        }
        if self.num_shortened:
            found[f"{self.kind}/shortened"] = self.num_shortened
        if self.num_off_distribution:
            found[f"{self.kind}/off_distribution"] = self.num_off_distribution
        if self.unrendered:
            found[f"{self.kind}/unrendered"] = self.unrendered
        return found


def take_census(
    kind: str,
    num_learned: int,
    num_measured: int,
    left_out: Sequence[tuple[str, LeftOut]],
    num_shortened: int = 0,
) -> Census:
    """Returns the census of what was used, and of what was left out: the sample's id and why."""
    counts = Counter(each.reason for _, each in left_out)
    named = [f"{sample_id} ({each.why})" for sample_id, each in left_out if each.reason == NOT_RENDERED]
    unrendered = "; ".join(named[:_MOST_NAMED]) + ("; …" if len(named) > _MOST_NAMED else "")
    num_read = num_learned + num_measured + len(left_out)
    return Census(kind, num_read, num_learned, num_measured, dict(counts), unrendered, num_shortened)


def not_rendered(error: Exception) -> LeftOut:
    """Returns why a sample was left out whose prompt or completions could not be turned into tokens."""
    return LeftOut(NOT_RENDERED, " ".join(str(error).split())[:_MOST_WHY])


def figures(censuses: Sequence[Census]) -> dict[str, float | str]:
    """Returns the figures of all of them."""
    return {name: value for each in censuses for name, value in each.figures().items()}


def write_census(folder: RunFolder, censuses: Sequence[Census]) -> None:
    """Writes them to the run's record, and says them in the trainer's log."""
    found = figures(censuses)
    folder.log("data", 0, 1, found)
    for sentence in sentences(found):
        logger.info("run %s reads %s", folder.path.name, sentence)
    for each in censuses:
        if each.unrendered:
            logger.warning("run %s: %s that cannot be rendered: %s", folder.path.name, each.kind, each.unrendered)


def outcomes(record: Record) -> Iterator[tuple[str, str, str]]:
    """Yields, for each kind that is counted in this record, the kind, how many were read, and what became of them."""
    for kind in KINDS:
        if f"{kind}/read" in record:
            yield kind, f"{record[f'{kind}/read']:.0f}", _outcome(record, kind)


def sentences(record: Record) -> list[str]:
    """Returns a sentence for each kind that is counted in this record."""
    return [f"{count} {kind}: {outcome}" for kind, count, outcome in outcomes(record)]


def reason_in_words(reason: str) -> str:
    """Returns why a ranking was left out, in words."""
    return "held out, to measure with" if reason == HELD_OUT else _words(f"{RANKINGS}/left_out/{reason}")


def _outcome(record: Record, kind: str) -> str:
    used = [
        f"{record[f'{kind}/{name}']:.0f} {words}"
        for name, words in (("learned", "learned from"), ("measured", "to measure with"))
    ]
    off = int(record.get(f"{kind}/off_distribution", 0))
    if off:
        used[1] += f", {off} of both drawn off the policy's distribution"
    prefix = f"{kind}/left_out/"
    counts = {name: int(record[name]) for name in record if name.startswith(prefix) and record[name]}
    if not counts:
        return f"{used[0]}, {used[1]}"
    said = [f"{counts[name]} {_words(name)}" for name in sorted(counts, key=lambda name: -counts[name])]
    return f"{used[0]}, {used[1]}, {sum(counts.values())} left out: {', '.join(said)}"


def _words(name: str) -> str:
    """Returns a reason as METRICS words it."""
    return METRICS.get(name, name).partition("left out: ")[2] or name


def _some(reasons: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in reasons.items() if count}
