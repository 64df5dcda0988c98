"""The verdict on a new policy: compares its answers to held-out prompts with the reference policy's answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from feedback.durable import write_json
from training.context import Answers, Rewards, Run
from training.data.intervals import Mean, WinRate, mean, win_rate
from training.models.parallel import led
from training.models.policy import reference_logprobs
from training.ppo.rollouts import from_rows, to_rows
from training.runs.folder import SamplePair

WIN_RATE, KL = "reward_model/win_rate_over_reference", "objective/kl_from_reference"
_ANSWERS = "answers.json"


@dataclass(frozen=True)
class Verdict:
    """The figures that decide whether a new policy may go live."""

    won: WinRate
    """Win rate over the reference policy, by the reward model."""
    kl: Mean
    """KL from the reference policy, in nats a completion."""


@dataclass(frozen=True)
class _Scored:
    """Answers to the evaluation prompts with their scores."""

    answers: Answers
    by_model: list[list[float]]


def draw_answers(run: Run, weights: Mapping[str, Tensor]) -> Answers:
    """Draws the new policy's answers to each evaluation prompt, as it will be served, and writes them to `state/`."""
    answers = run.context.draw(run.ask(weights, again=True))
    write_json(run.folder.state / _ANSWERS, to_rows(answers))
    return answers


def load_answers(run: Run) -> Answers | None:
    """Reads back the answers that `draw_answers` wrote; returns None if they have not been drawn yet."""
    path = run.folder.state / _ANSWERS
    return from_rows(json.loads(path.read_text())) if path.exists() else None


def evaluate(run: Run, rewards: Rewards, answers: Answers) -> Verdict:
    """Compares the new policy with the reference policy by the reward model, and writes samples. A collective."""
    before, after = (_Scored(each, run.scores(rewards.model, each)) for each in (rewards.before, answers))
    held_out_scores = run.scores(rewards.held_out_model, answers)
    by_reference = iter(reference_logprobs(run.shared, run.groups(answers)))
    log_ratios = [fmean(sum(answer.logprobs) - next(by_reference) for answer in each) for each in answers]
    verdict = Verdict(win_rate(after.by_model, before.by_model), mean(log_ratios))
    means = {
        "score": fmean(map(fmean, after.by_model)),
        "held_out_score": fmean(map(fmean, held_out_scores)),
    }
    led(run.context.ranks, lambda: _write_evaluation(run, before, after, verdict, means))
    return verdict


def _write_evaluation(run: Run, before: _Scored, after: _Scored, verdict: Verdict, means: Mapping[str, float]) -> None:
    run.folder.rewind("evaluate", 0)
    won = verdict.won
    counts = {"prompts": won.count, "wins": won.wins, "ties": won.ties, "losses": won.losses}
    metrics = {WIN_RATE: won.value, "low": won.low, "high": won.high, **counts, KL: verdict.kl.value, **means}
    run.folder.log("evaluate", 0, 1, metrics)
    # A run that an earlier release began may have one answer of the reference to several of the new policy.
    run.folder.write_samples(
        [
            SamplePair(prompt.text, run.context.text(old), run.context.text(new), index, old_score, new_score)
            for prompt, *found in zip(
                run.evaluation_prompts, before.answers, before.by_model, after.answers, after.by_model, strict=True
            )
            for index, (old, old_score, new, new_score) in enumerate(zip(*found, strict=False))
        ]
    )
