"""The verdict on a new policy: compares its answers to held-out prompts with the reference policy's answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feedback.durable import write_json
from training.context import Rewards, Run
from training.data.intervals import Mean, WinRate, mean, win_rate
from training.models.parallel import led
from training.models.policy import reference_logprobs
from training.models.reward import score_groups
from training.ppo.rollouts import Request, Rollout, from_row, to_row
from training.runs.folder import NUM_SAMPLE_PAIRS, SamplePair

WIN_RATE, KL = "reward_model/win_rate_over_reference", "objective/kl_from_reference"
_ANSWERS = "answers.json"


@dataclass(frozen=True)
class Verdict:
    """The figures that decide whether a new policy may go live."""

    won: WinRate
    """Win rate over the reference policy, by the reward model."""
    kl: Mean
    """KL from the reference policy, in nats a completion."""


def draw_answers(run: Run, weights: Mapping[str, Tensor]) -> list[Rollout]:
    """Draws the new policy's answer to each evaluation prompt, as it will be served, and writes them to `state/`."""
    prompts = [prompt.token_ids for prompt in run.evaluation_prompts]
    # Each prompt has the next seed: these seeds begin where those of the reference policy's answers end.
    seed = run.config.seed + len(prompts)
    drawn = run.context.draw(Request(weights.items(), prompts, 1, run.config.ppo.max_tokens, seed))
    answers = [each[0] for each in drawn]
    write_json(run.folder.state / _ANSWERS, [to_row(each) for each in answers])
    return answers


def load_answers(run: Run) -> list[Rollout] | None:
    """Reads back the answers that `draw_answers` wrote; returns None if they have not been drawn yet."""
    path = run.folder.state / _ANSWERS
    return [from_row(each) for each in json.loads(path.read_text())] if path.exists() else None


def evaluate(run: Run, rewards: Rewards, answers: Sequence[Rollout]) -> Verdict:
    """Compares the new policy with the reference policy by the reward model, and writes samples. A collective."""
    groups = run.groups(answers)
    scores, reference_scores = (
        torch.cat(score_groups(rewards.model, each)).tolist() for each in (groups, run.groups(rewards.before))
    )
    by_reference = reference_logprobs(run.shared, groups)
    log_ratios = [sum(each.logprobs) - logprob for each, logprob in zip(answers, by_reference, strict=True)]
    verdict = Verdict(win_rate(scores, reference_scores), mean(log_ratios))
    led(run.context.ranks, lambda: _write_evaluation(run, rewards, answers, verdict))
    return verdict


def _write_evaluation(run: Run, rewards: Rewards, answers: Sequence[Rollout], verdict: Verdict) -> None:
    run.folder.rewind("evaluate", 0)
    won = verdict.won
    metrics = {WIN_RATE: won.value, "low": won.low, "high": won.high, KL: verdict.kl.value}
    run.folder.log("evaluate", 0, 1, metrics | {"wins": won.wins, "ties": won.ties, "losses": won.losses})
    rows = itertools.islice(zip(run.evaluation_prompts, rewards.before, answers, strict=True), NUM_SAMPLE_PAIRS)
    run.folder.write_samples(
        [SamplePair(prompt.text, run.context.text(old), run.context.text(new)) for prompt, old, new in rows]
    )
