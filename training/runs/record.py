"""Writes and reads metrics.jsonl, and defines the names of its phases and figures.

Each line is a JSON object: when it was written, its phase, `index` and `count`, and figures. `index` and `count` are of
rounds in PPO, of epochs in SFT, and of rankings while the reward model is fitted. Whoever follows the file sees each
line whole, as soon as that round, epoch or ranking is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback import heartbeat
from feedback.durable import replace_file

METRICS_FILE = "metrics.jsonl"

Record = Mapping[str, Any]

RECORD_KEYS: Mapping[str, str] = {
    "time": "when the line was written, Unix seconds",
    "phase": "one of PHASES",
    "index": "of the round, epoch or ranking in its phase, from 0",
    "count": "how many of these the phase has, as far as is known",
}
PHASES: Mapping[str, str] = {
    "data": "reading what to learn from",
    "reward_model": "fitting the reward model",
    "reward_model_evaluation": "evaluating the reward model",
    "normalise": "sampling the reference policy",
    "ppo": "PPO",
    "sft_reference": "sampling the reference policy",
    "sft": "fine-tuning",
    "evaluate": "evaluating the new policy",
    "register": "registering the new version",
    "done": "the end of a run that made a version",
    "stopped": "the end of a run that made none",
}
ENDS = ("done", "stopped")
COUNTED: Mapping[str, str] = {"reward_model": "ranking", "ppo": "round", "sft": "epoch"}
"""What `index` and `count` of a phase count; the other phases have a single line."""
METRICS: Mapping[str, str] = {
    # What was read: all of it was learned from, measured with, or left out for one of the reasons.
    "rankings/read": "rankings in the store when the run began",
    "rankings/learned": "rankings that the reward model learned from",
    "rankings/measured": "held-out rankings that it was measured with",
    "rankings/shortened": "rankings of both kinds that were used without their longest completions",
    "rankings/off_distribution": "rankings of both kinds whose samples were not drawn as PPO draws",
    "rankings/unrendered": "the first few samples of rankings that cannot be rendered",
    "rankings/left_out/no_sample": "rankings left out: without their sample in the store",
    "rankings/left_out/superseded": "rankings left out: superseded by the user's later one of the sample",
    "rankings/left_out/older": "rankings left out: older than the newest reward_model.max_rankings",
    "rankings/left_out/held_out_in_part": "rankings left out: held out by user or by prompt, but not by both",
    "rankings/left_out/spans_swap": "rankings left out: without a comparison, as completions span a swap",
    "rankings/left_out/no_comparison": "rankings left out: without a comparison",
    "rankings/left_out/not_rendered": "rankings left out: of a sample that cannot be rendered",
    "rankings/left_out/prompt_too_long": "rankings left out: of a prompt longer than ppo.max_prompt_tokens",
    "rankings/left_out/too_long": "rankings left out: longer than reward_model.micro_batch_tokens",
    "prompts/read": "different prompts in the store when the run began",
    "prompts/learned": "prompts that PPO draws from",
    "prompts/measured": "held-out prompts, of which num_evaluation_prompts are measured with",
    "prompts/unrendered": "the first few samples of prompts that cannot be rendered",
    "prompts/left_out/older": "prompts left out: older than the newest 100,000",
    "prompts/left_out/not_rendered": "prompts left out: that cannot be rendered",
    "prompts/left_out/too_long": "prompts left out: longer than ppo.max_prompt_tokens",
    "demonstrations/read": "demonstrations in the store when SFT began",
    "demonstrations/learned": "demonstrations that SFT learned from",
    "demonstrations/measured": "demonstrations by whose prompts the best epoch was chosen",
    "demonstrations/unrendered": "the first few samples of demonstrations that cannot be rendered",
    "demonstrations/left_out/no_sample": "demonstrations left out: without their sample in the store",
    "demonstrations/left_out/superseded": "demonstrations left out: superseded by the user's later one of the sample",
    "demonstrations/left_out/held_out_in_part": "demonstrations left out: held out, but not to choose an epoch by",
    "demonstrations/left_out/not_rendered": "demonstrations left out: of a sample that cannot be rendered",
    "demonstrations/left_out/prompt_too_long": "demonstrations left out: of a prompt longer than ppo.max_prompt_tokens",
    "demonstrations/left_out/too_long": "demonstrations left out: longer than sft.max_tokens",
    # The reward model.
    "reward_model/loss": "loss while fitting, nats a comparison, with the L2 penalty",
    "reward_model/accuracy": "share of comparisons that the reward model orders as the labeler did, while fitting",
    "reward_model/held_out_accuracy": "this share on held-out rankings",
    "reward_model/accuracy_low": "lower end of its 95 % interval, clustered by ranking",
    "reward_model/accuracy_high": "upper end of this interval",
    "reward_model/held_out_comparisons": "number of held-out comparisons",
    "reward_model/parent_accuracy": "held-out accuracy of the previous reward model, on the same comparisons",
    "reward_model/refused": "1 if the new reward model was refused and the previous one is used, else 0",
    "reward_model/reference_std": "standard deviation of the reference policy's scores before they were normalised",
    "best_of_n": "table: n, KL in nats, and the scores, by the reward model and by the held-out reward model, of the "
    "reference policy's best of n completions by the reward model",
    "by_k": "table: completions ranked, accuracy, comparisons",
    "by_labeler": "table: labeler, accuracy, comparisons",
    "by_length_difference": "table: least and most tokens by which the preferred completion is longer, accuracy, "
    "comparisons",
    "calibration": "table: predicted probability of the likelier order, share that has this order, comparisons",
    "uncertainty": "table: standard deviation of the margin over heads, accuracy, comparisons",
    # A round's rollouts, which measure the policy that drew them.
    "objective/kl": "KL from the reference policy, nats a completion",
    "objective/score": "score by the reward model, in standard deviations of the reference policy's scores",
    "objective/held_out_score": "score by the held-out reward model, in the same unit",
    "objective/held_out_error": "standard error of that score's mean",
    "objective/entropy": "entropy of the policy, nats a token",
    "completion/length": "tokens of a completion",
    "completion/eos_rate": "share of completions that end by themselves",
    "rollout/sampler_gap": "mean difference of the sampler's and the trainer's log-probabilities, nats a token",
    # A round's update.
    "policy/kl_coef": "weight of the KL penalty, scores a nat",
    "policy/loss": "clipped policy loss of PPO",
    "policy/clipfrac": "share of tokens whose probability ratio was clipped",
    "policy/approx_kl": "half the mean squared log-ratio of new and old policy, nats a token",
    "policy/grad_norm": "norm of the policy's gradient before clipping",
    "val/loss": "clipped value loss",
    "val/clipfrac": "share of tokens whose value was clipped",
    "val/explained_variance": "share of the returns' variance that the values explain",
    "ptx/loss": "pretraining loss, nats a token",
    "ptx/gamma": "weight of the pretraining gradient",
    "ptx/grad_ratio": "norm of the weighted pretraining gradient over that of PPO's",
    "seconds/rollouts": "seconds of the round's rollouts, including the copy of weights to the sampler",
    "seconds/scoring": "seconds of the round's scoring",
    "seconds/update": "seconds of the round's update",
    "stopped/reason": "why PPO stopped itself in this round",
    # SFT.
    "sft/loss": "loss on the demonstrated completions, nats a token",
    "sft/score": "mean score of the answers to validation prompts, by the reward model",
    # The new version.
    "reward_model/win_rate_over_reference": "share of pairs of completions of a held-out prompt in which the new "
    "policy's has the higher score, as the mean over prompts",
    "low": "lower end of the win rate's 95 % interval",
    "high": "upper end of this interval",
    "prompts": "held-out prompts that were answered",
    "wins": "pairs won",
    "ties": "pairs tied",
    "losses": "pairs lost",
    "score": "mean score of its answers to held-out prompts, by the reward model",
    "held_out_score": "mean score of these answers by the held-out reward model",
    "objective/kl_from_reference": "KL of its answers to held-out prompts, nats a completion",
    "version": "number of the new version",
    "promoted": "1 if the new version went live, else 0",
    "reason": "why the run stopped",
}


def append(path: Path, phase: str, index: int, count: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line.

    Raises:
        ValueError: the phase is not in PHASES, or a figure is not in METRICS.
        OSError: such as for a full disk.
    """
    unknown = [*({phase} - PHASES.keys()), *sorted(metrics.keys() - METRICS.keys())]
    if unknown:
        raise ValueError(f"{METRICS_FILE} has nothing called {', '.join(unknown)}: see training/runs/record.py")
    heartbeat.beat()
    line = {"time": time.time(), "phase": phase, "index": index, "count": count, **metrics}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def rewind(path: Path, phase: str, index: int) -> None:
    """Removes the lines of `phase` from this index on, and all lines after: they will be written again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines):
        # A kill while a line was written leaves a part of it, which is always the last line.
        entry: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"phase": phase, "index": index}
        if entry["phase"] == phase and entry["index"] >= index:
            replace_file(path, "".join(lines[:number]))
            return


def place_of(records: Sequence[Record]) -> str:
    """Returns in words how far a run has come, which has written these records."""
    if not records:
        return "at once"
    last = records[-1]
    name = PHASES.get(last["phase"], last["phase"])
    if last["count"] == 1:
        return f"after {name}"
    return f"in {name}, after {COUNTED.get(last['phase'], 'record')} {last['index'] + 1} of {last['count']}"


@dataclass(frozen=True)
class Lines:
    """The objects of a .jsonl file, in order, and how many lines had no such object."""

    found: Sequence[Record]
    num_unreadable: int


def read_lines(path: Path, keys: Set[str] = RECORD_KEYS.keys()) -> Lines:
    """Reads a .jsonl file of objects that have `keys`. A file that does not exist counts as empty.

    A last line without a line end is left out: it is still being written, or the run was killed while it was.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [_object(line) for line in text.split("\n")[:-1]]
    found = [line for line in lines if keys <= line.keys()]
    return Lines(found, len(lines) - len(found))


def of_phase(records: Sequence[Record], phase: str) -> list[Record]:
    """Returns the records of a phase, oldest first."""
    return [record for record in records if record["phase"] == phase]


def last_of(records: Sequence[Record], phase: str) -> Record:
    """Returns the newest record of a phase; an empty one if there is none."""
    return next(reversed(of_phase(records, phase)), {})


def _object(line: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
