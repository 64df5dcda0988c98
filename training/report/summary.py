"""Summarizes a run for its report: the finding in a sentence, tables of figures, why it stopped, and its settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.config import TrainingConfig
from training.report.history import Change, RunHistory, duration, fall_from_best, series
from training.report.reward_plots import shares
from training.runs.record import Record, last_of, of_phase, place_of

_MOST_REASON = 160  # characters of a reason in the finding; further down the reason is given in full
_MOST_ROUNDS = 8  # most rounds that are listed where a metric is not finite
WIN_RATE, KL = "reward_model/win_rate_over_reference", "objective/kl_from_reference"
# Names in the report of the manifest's evaluations, and their units.
_EVALUATIONS = {KL: ("KL of its answers to held-out prompts", "nats a completion; ")}
_EVALUATED = (
    ("score", "score of its answers to held-out prompts"),
    ("held_out_score", "score of these answers by the held-out reward model"),
)
_COUNTS = {"wins": "won", "ties": "tied", "losses": "lost"}
_ACCURACY = ("held_out_accuracy", "accuracy_low", "accuracy_high")
# Each metric with its name in the report, its format and its unit.
_POLICY_FIGURES = (
    ("objective/score", "score, by the reward model", "{:z.2f}", "standard deviations of the reference’s scores"),
    (
        "objective/held_out_score",
        "score, by the held-out reward model",
        "{:z.2f}",
        "standard deviations of the reference’s scores",
    ),
    ("objective/kl", "KL from the reference policy", "{:z.2f}", "nats a completion"),
    ("objective/entropy", "entropy", "{:.2f}", "nats a token"),
    ("completion/length", "completion length", "{:.0f}", "tokens"),
    ("completion/eos_rate", "completions that end by themselves", "{:.0%}", ""),
)
_OPTIMISER_FIGURES = (
    ("policy/loss", "policy loss", "{:.2g}", ""),
    ("policy/clipfrac", "policy’s tokens clipped", "{:.1%}", ""),
    ("policy/approx_kl", "approximate KL of an update", "{:.2g}", "nats a token"),
    ("policy/grad_norm", "gradient norm, before clipping", "{:.2g}", ""),
    ("policy/kl_coef", "KL coefficient", "{:.3g}", "scores a nat"),
    ("val/loss", "value loss", "{:.2g}", ""),
    ("val/clipfrac", "values clipped", "{:.1%}", ""),
    ("val/explained_variance", "explained variance of the value function", "{:z.2f}", ""),
    ("rollout/sampler_gap", "sampler gap", "{:.2g}", "nats a token"),
    ("ptx/loss", "pretraining loss", "{:.3f}", "nats a token"),
    ("ptx/gamma", "pretraining weight γ", "{:.3g}", ""),
    ("ptx/grad_ratio", "pretraining gradient over PPO’s", "{:.2g}", ""),
)


@dataclass(frozen=True)
class Figure:
    """A line of the table of figures."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Setting:
    """A line of the recipe. `default` is empty where the value is the default."""

    name: str
    value: str
    default: str


def finding(run: RunHistory) -> str:
    """Returns the run's result in one sentence."""
    records = run.records
    if not records:
        return "This run has left no measurements."
    last, version = records[-1], last_of(records, "register").get("version")
    if last["phase"] == "stopped":
        reason = _short(str(last.get("reason", "no reason given")))
        if version:
            return f"The run registered version {version}, then stopped: {reason}"
        return f"The run stopped {place_of(records[:-1])}, and made no version: {reason}"
    if last["phase"] == "done" and (epochs := _sft_epochs(run)):
        best, reference = _best_epoch(epochs), _number(last_of(records, "sft_reference"), "sft/score")
        return (
            f"Version {version} is the reference policy fine-tuned on demonstrations, epoch {best['index'] + 1} of "
            f"{len(epochs)}: its score by the reward model is {_number(best, 'sft/score'):z.2f}, the reference's "
            f"{reference:z.2f}."
        )
    won = last_of(records, "evaluate")
    if not won:
        return f"The run has not ended: its records break off {place_of(records)}."
    clauses = [_win_rate(won, f"version {version}" if version else "the new policy"), *_held_out_score(run.rounds)]
    if version:
        promoted = last_of(records, "register").get("promoted")
        clauses.append(f"it was {'' if promoted else 'not '}promoted")
    clauses += [f"PPO stopped itself in round {each['index'] + 1} of {each['count']}" for each in _cut_short(run)]
    return _capitalized("; ".join(clauses)) + "."


def _sft_epochs(run: RunHistory) -> list[Record]:
    """Returns the records of SFT's epochs; a run of PPO has none."""
    return of_phase(run.records, "sft")


def _best_epoch(epochs: Sequence[Record]) -> Record:
    """Returns the epoch that is the result: the one with the highest score among those with a finite loss."""
    return max(epochs, key=lambda epoch: (math.isfinite(_number(epoch, "sft/loss")), _number(epoch, "sft/score")))


def _win_rate(won: Record, policy: str) -> str:
    value, low, high = _number(won, WIN_RATE), _number(won, "low"), _number(won, "high")
    share = f"{value:.0%} of pairs of completions of {_count(won)} held-out prompts, by the reward model"
    if low > 0.5:
        return f"{policy} beats the reference policy in {share}"
    if high < 0.5:
        return f"{policy} falls behind the reference policy: it wins only {share}"
    return f"{policy} is not clearly better or worse than the reference policy: it wins {share}"


def _held_out_score(rounds: Sequence[Record]) -> list[str]:
    """Returns how the held-out reward model's score changed while the reward model's did."""
    held_out, score = series(rounds, "objective/held_out_score"), Change.of(series(rounds, "objective/score"))
    change, fall = Change.of(held_out), fall_from_best(held_out)
    if math.isnan(change.before):
        return []
    parted = ", a sign of over-optimisation" if fall and score.clear and score.after > score.before else ""
    ends = f" and ends {fall:.2g} below its best{parted}" if fall else ""
    return [f"its score by the held-out reward model {change.words}{ends}"]


def _short(reason: str) -> str:
    line = reason.strip().partition("\n")[0]
    return line if len(line) <= _MOST_REASON else line[: _MOST_REASON - 1].rstrip() + "…"


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(record: Record, key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _count(won: Record) -> int:
    """Returns how many prompts there were. Earlier releases compared one pair of each."""
    return int(won.get("prompts", sum(int(won.get(key, 0)) for key in _COUNTS)))


def stops(run: RunHistory) -> list[str]:
    """Returns why PPO or the run stopped early; nothing if neither did."""
    found = [
        f"PPO stopped itself in round {record['index'] + 1} of {record['count']}: {record['stopped/reason']}"
        for record in _cut_short(run)
    ]
    records = run.records
    if not records:
        return ["The run has not measured anything: it was killed at once, or has only begun."]
    if records[-1]["phase"] == "stopped":
        found.append(f"The run stopped: {records[-1].get('reason', 'no reason given')}")
    elif records[-1]["phase"] != "done":
        found.append(f"The records break off {place_of(records)}: the run was killed, or is still under way.")
    return found


def _cut_short(run: RunHistory) -> list[Record]:
    return [each for each in run.rounds if "stopped/reason" in each]


def figures(run: RunHistory) -> list[Figure]:
    """Returns the run's main figures, without those that it has not measured."""
    won, rewards = last_of(run.records, "evaluate"), last_of(run.records, "reward_model_evaluation")
    return [
        *_outcome(won, last_of(run.records, "register")),
        *(
            Figure(
                f"epoch {epoch['index'] + 1}",
                f"{_number(epoch, 'sft/score'):z.2f}",
                f"score, by the reward model; loss {_number(epoch, 'sft/loss'):.3f} nats a token",
            )
            for epoch in _sft_epochs(run)
        ),
        *_of_metrics(run.rounds, _POLICY_FIGURES),
        *_reward_model(rewards),
        *_evaluations(run),
        *_time(run),
        *_not_finite(run.rounds),
    ]


def fitting_figures(run: RunHistory) -> list[Figure]:
    """Returns the figures of fitting and updates, which only some readers need."""
    return [
        *_fit(last_of(run.records, "reward_model"), last_of(run.records, "normalise")),
        *_of_metrics(run.rounds, _OPTIMISER_FIGURES),
    ]


def _outcome(won: Record, registered: Record) -> Iterator[Figure]:
    if registered:
        promoted = "promoted" if registered.get("promoted") else "not promoted"
        yield Figure("version registered", str(registered.get("version", "?")), promoted)
    if won:
        interval = f"95% interval {_number(won, 'low'):.1%} to {_number(won, 'high'):.1%}"
        counts = ", ".join(f"{won.get(key, '?')} {name}" for key, name in _COUNTS.items())
        pairs = f"of the pairs of {_count(won)} held-out prompts, {counts}"
        yield Figure("win rate, by the reward model", f"{_number(won, WIN_RATE):.1%}", f"{interval}; {pairs}")
        for key, name in _EVALUATED:
            if key in won:
                yield Figure(name, f"{_number(won, key):z.2f}", "standard deviations of the reference’s scores")


def _of_metrics(rounds: Sequence[Record], rows: Sequence[tuple[str, str, str, str]]) -> Iterator[Figure]:
    for key, name, form, unit in rows:
        if any(key in each for each in rounds):
            change = Change.of(series(rounds, key))
            before, after = form.format(change.before), form.format(change.after)
            unclear = "within its noise" if len(rounds) > 2 and before != after and not change.clear else ""
            value = "not finite" if math.isnan(change.before) else after if before == after else f"{before} → {after}"
            yield Figure(name, value, "; ".join(part for part in (unit, unclear) if part))


def _not_finite(rounds: Sequence[Record]) -> Iterator[Figure]:
    keys = dict.fromkeys(key for each in rounds for key, value in each.items() if isinstance(value, float))
    for key in keys:
        bad = [each["index"] + 1 for each in rounds if key in each and not math.isfinite(_number(each, key))]
        if bad:
            named = ", ".join(map(str, bad[:_MOST_ROUNDS])) + (", …" if len(bad) > _MOST_ROUNDS else "")
            yield Figure(f"{key} is not finite", f"{len(bad)} of {len(rounds)} rounds", f"in round {named}")


def _fit(fitted: Record, normalised: Record) -> Iterator[Figure]:
    if "reward_model/loss" in fitted:
        accuracy = f"accuracy {_number(fitted, 'reward_model/accuracy'):.1%} on the rankings that it learned from"
        yield Figure("reward model’s loss", f"{_number(fitted, 'reward_model/loss'):.3f}", accuracy)
    if normalised:
        deviation = f"{_number(normalised, 'reward_model/reference_std'):.2f}"
        yield Figure("standard deviation of the reference policy’s scores", deviation, "before it was scaled to 1")


def _reward_model(rewards: Record) -> Iterator[Figure]:
    if rewards:
        accuracy, low, high = (_number(rewards, f"reward_model/{key}") for key in _ACCURACY)
        interval = "" if math.isnan(low + high) else f"95% interval {low:.1%} to {high:.1%}; "
        count = f"{rewards.get('reward_model/held_out_comparisons', 0):.0f} held-out comparisons"
        yield Figure("reward model’s accuracy", f"{accuracy:.1%}", interval + count)
        if "reward_model/parent_accuracy" in rewards:
            parent = _number(rewards, "reward_model/parent_accuracy")
            verdict = (
                "the new one was refused, and this one kept"
                if rewards.get("reward_model/refused")
                else "the new one is used"
            )
            yield Figure("accuracy of the previous reward model", f"{parent:.1%}", f"same comparisons; {verdict}")
    if by_labeler := shares(rewards.get("by_labeler", ())):
        percents = [each.percent for each in by_labeler]
        detail = f"{len(percents)} labelers, median {np.median(percents):.0f}%"
        yield Figure("accuracy by labeler", f"{min(percents):.0f}% to {max(percents):.0f}%", detail)


def _evaluations(run: RunHistory) -> Iterator[Figure]:
    """Yields the manifest's evaluations except the win rate, which the run's own records have."""
    for each in run.manifest.evaluations if run.manifest else ():
        if each.name != WIN_RATE:
            has_interval = each.HasField("low") and each.HasField("high")
            interval = f"95% interval {each.low:.3g} to {each.high:.3g}; " if has_interval else ""
            name, unit = _EVALUATIONS.get(each.name, (each.name, ""))
            yield Figure(name, f"{each.value:.3g}", f"{unit}{interval}n = {each.count}")


def _time(run: RunHistory) -> Iterator[Figure]:
    if len(run.records) > 1:
        seconds = run.records[-1]["time"] - run.records[0]["time"]
        yield Figure("time", duration(seconds), "from first to last record")


def settings(recipe: Mapping[str, Any]) -> Iterator[Setting]:
    """Yields the recipe's fields, each with its default if it was set to something else."""
    defaults = dict(_flat(TrainingConfig().model_dump(mode="json")))
    for name, value in _flat(recipe):
        default = defaults.get(name, value)
        yield Setting(name, _shown(value), "" if value == default else _shown(default))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: object) -> str:
    return "not set" if value is None else "empty" if value == "" else str(value)
