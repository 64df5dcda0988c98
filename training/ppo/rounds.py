"""The rounds of PPO and PPO-ptx: each draws rollouts, and updates the policy and the value model on them.

A round draws rollouts from the present policy, computes their advantages (training.ppo.experience), and takes one
optimizer step for each minibatch on the clipped losses; PPO-ptx adds the pretraining gradient (training.ppo.ptx).
Everything random depends on the seed and the round alone, so that a run resumes from a checkpoint bit for bit. Several
ranks together take the step that one would take (training.models.parallel). Shapes: see training.data.groups.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from policies.host_memory import give_back
from policies.precision import compute_dtype
from training.config import PpoConfig
from training.errors import TrainingError
from training.models.masters import (
    Weights,
    cast,
    copy_weights,
    noise_source,
    placed_weights,
    set_weights,
    trained,
    trained_weights,
)
from training.models.parallel import gathered, led, whole
from training.models.policy import merged_tensors
from training.ppo import ppo_math, ptx
from training.ppo.experience import Minibatch, Outputs, gather, observe
from training.ppo.gradients import accumulate_gradients
from training.ppo.guards import is_good, stop_reason
from training.ppo.learner import Learner, average, learner_state, restore_learner
from training.ppo.rollouts import Draw, Request
from training.runs.checkpoint import newest_checkpoint, save_checkpoint

Prompt = tuple[int, ...]
Log = Callable[[int, int, dict[str, Any]], None]

_ROUND_SEED, _RUN_SEED = 1_009, 100_003


@dataclass(frozen=True)
class PpoHooks:
    """What PPO reads and calls: prompts, the sampler, the log, pretraining text, checkpoints, and operators.

    Every rank has its own; prompts, pretraining text and checkpoints are the same on all ranks.
    """

    prompts: Sequence[Prompt]
    draw: Draw
    log: Log
    """Called on each rank, with figures that are the same except for times."""
    pretraining: Iterator[tuple[int, ...]] | None = None
    """Sequences of tokens, without end; None for plain PPO."""
    checkpoints: Path | None = None
    between_rounds: Callable[[], None] = lambda: None
    """Called between two rounds; may wait, or raise to end the run."""


class _NotFiniteError(Exception):
    """The losses or gradients of an update are not finite. All ranks raise it together."""


@dataclass
class _Progress:
    """How far a run is, and all that a checkpoint needs besides the learner's own state."""

    round: int
    """The next round, from 0."""
    kl_coef: float
    gamma: ptx.Gamma
    good: Weights
    """Weights of the last policy that the guards found good, as they were before the round `good_round`."""
    averaged: Weights
    good_round: int = 0
    rounds: list[dict[str, float]] = field(default_factory=list)
    num_sequences: int = 0
    """Pretraining sequences used."""


def train(learner: Learner, config: PpoConfig, hooks: PpoHooks, *, seed: int) -> str | None:
    """Runs `num_rounds` rounds, and returns why PPO stopped itself before that, or None if it did not.

    The result is in `learner.policy`: the average of weights if there is one, else the last weights; or the last good
    policy if PPO stopped itself.

    Raises:
        TrainingError: PPO stopped before it made a good policy, or ranks cannot divide an optimizer step's prompts.
    """
    divisor = config.num_minibatches * learner.ranks.size
    if config.prompts_per_round % divisor:
        raise TrainingError(
            f"ppo.prompts_per_round: {config.prompts_per_round} is not a multiple of {divisor}, "
            f"num_minibatches times {learner.ranks.size} processes"
        )
    progress = _begin(learner, config, hooks)
    turns = itertools.islice(_turns(hooks.prompts, config.prompts_per_round, seed), progress.round, None)
    while progress.round < config.num_rounds:
        hooks.between_rounds()
        try:
            reason, metrics = _round(learner, config, hooks, progress, next(turns), seed)
        except _NotFiniteError as error:
            reason, metrics = str(error), dict(progress.rounds[-1])
        if reason and progress.good_round == 0:
            raise TrainingError(f"PPO stopped in round {progress.round + 1} with nothing better to keep: {reason}")
        if reason:
            set_weights(learner.policy, progress.good)
            cast(learner.policy, _seed_of(seed, progress.good_round))
            hooks.log(progress.round, config.num_rounds, metrics | {"stopped/reason": reason})
            return reason
        hooks.log(progress.round, config.num_rounds, metrics)
        progress.round += 1
        if hooks.checkpoints and progress.round % config.checkpoint_every_rounds == 0:
            _save(learner, progress, hooks.checkpoints)
    if config.ema_decay:
        set_weights(learner.policy, progress.averaged)
    cast(learner.policy, _seed_of(seed, config.num_rounds))
    return None


def _seed_of(seed: int, round_index: int) -> int:
    return seed * _RUN_SEED + round_index * _ROUND_SEED


def _begin(learner: Learner, config: PpoConfig, hooks: PpoHooks) -> _Progress:
    start = trained_weights(learner.policy)
    averaged = {name: tensor.clone() for name, tensor in start.items()} if config.ema_decay else {}
    progress = _Progress(0, config.kl_coef, ptx.Gamma(config.ptx), start, averaged)
    found = newest_checkpoint(hooks.checkpoints) if hooks.checkpoints else None
    if found:
        parts: dict[str, Weights] = {"learner": {}, "good": {}, "averaged": {}}
        for name, tensor in found.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        restore_learner(learner, parts["learner"])
        progress.round, progress.good = found.round, placed_weights(learner.policy, parts["good"])
        progress.averaged = placed_weights(learner.policy, parts["averaged"])
        progress.kl_coef, progress.rounds = found.facts["kl_coef"], found.facts["rounds"]
        progress.gamma.asked, progress.num_sequences = found.facts["gamma_asked"], found.facts["num_sequences"]
        # Checkpoints of earlier releases do not have it.
        progress.good_round = found.facts.get("good_round", found.round)
    if hooks.pretraining:
        next(itertools.islice(hooks.pretraining, progress.num_sequences, progress.num_sequences), None)
    return progress


def _save(learner: Learner, progress: _Progress, folder: Path) -> None:
    """Gathers all weights, tensor by tensor, and has the first rank write a checkpoint."""
    parts = {"learner": learner_state(learner), "good": progress.good, "averaged": progress.averaged}
    tensors: Weights = {}
    for part, found in parts.items():
        for name, tensor in found.items():
            # One at a time, because all of them may not fit one device, and only the first rank needs them.
            found_whole = whole(tensor)
            if learner.ranks.leads:
                tensors[f"{part}/{name}"] = found_whole.cpu()
    facts = {
        "kl_coef": progress.kl_coef,
        "rounds": progress.rounds,
        "gamma_asked": progress.gamma.asked,
        "num_sequences": progress.num_sequences,
        "good_round": progress.good_round,
    }
    led(learner.ranks, lambda: save_checkpoint(folder, progress.round, tensors, facts))


def _round(
    learner: Learner, config: PpoConfig, hooks: PpoHooks, progress: _Progress, prompts: Sequence[Prompt], seed: int
) -> tuple[str | None, dict[str, Any]]:
    """Does one round, and returns why PPO must stop, or None, and the round's figures. It stops before the update.

    Raises:
        _NotFiniteError: a loss or gradient of the update is not finite.
    """
    give_back()
    started = time.perf_counter()
    round_seed = _seed_of(seed, progress.round)
    for module in (learner.policy, learner.value):
        cast(module, round_seed)
    if config.final_kl_coef is not None:
        progress.kl_coef = ppo_math.moved(config.kl_coef, config.final_kl_coef, progress.round, config.num_rounds)
    device = learner.shared.device
    noise = noise_source(device, round_seed) if config.stochastic_rounding else None
    own = learner.ranks.share(len(prompts))
    rollouts = hooks.draw(
        Request(
            # In the precision that the trainer computes in. Where that is fp32, rounding to bf16 would lose small
            # changes, and the rollouts would be the old policy's.
            weights=merged_tensors(learner.shared, learner.policy, compute_dtype(device), noise),
            prompts=prompts[own.start : own.stop],
            num_completions=config.rollouts_per_prompt,
            max_tokens=config.max_tokens,
            # A prompt's seed depends on its place in the round, not on the rank that draws its rollouts.
            seed=round_seed + own.start * config.rollouts_per_prompt,
        )
    )
    rows = list(zip(prompts, gathered(learner.ranks, rollouts), strict=True))
    sampled = time.perf_counter()
    minibatches, outputs = gather(learner, config, rows, progress.kl_coef, round_seed)
    observed = observe(minibatches, learner.ranks)
    # All ranks take the first one's figures, so that all decide the same.
    seen = led(learner.ranks, lambda: observed)
    progress.rounds.append(seen)
    reason = stop_reason(progress.rounds, config)
    if reason:
        return reason, seen
    if is_good(progress.rounds):
        # In place, because a second copy beside the activations that `outputs` keeps would be the most at any time.
        copy_weights(learner.policy, progress.good)
        progress.good_round = progress.round
    # Drawing and scoring have freed more than they leave, in pieces that the update's own tensors do not fit.
    give_back()
    scored = time.perf_counter()
    metrics: dict[str, Any] = seen | {"policy/kl_coef": progress.kl_coef}
    metrics |= _update(learner, config, hooks, progress, minibatches, outputs, round_seed)
    if config.ema_decay:
        average(progress.averaged, learner.policy, config.ema_decay)
    if config.target_kl is not None:
        num_rollouts = config.prompts_per_round * config.rollouts_per_prompt
        progress.kl_coef = ppo_math.adapted_kl_coef(
            progress.kl_coef, seen["objective/kl"], config.target_kl, num_rollouts, config.kl_horizon
        )
    return None, metrics | {
        "seconds/rollouts": sampled - started,
        "seconds/scoring": scored - sampled,
        "seconds/update": time.perf_counter() - scored,
    }


def _update(
    learner: Learner,
    config: PpoConfig,
    hooks: PpoHooks,
    progress: _Progress,
    minibatches: Sequence[Minibatch],
    outputs: Outputs | None,
    seed: int,
) -> dict[str, float]:
    """Takes an optimizer step for each minibatch in each of `num_epochs` epochs; returns the means of their figures.

    `outputs` are those of the first minibatch, if scoring has kept them.
    """
    factor = ppo_math.rate_factor(progress.round, config.num_rounds, config.num_warmup_rounds, config.num_decay_rounds)
    for group in learner.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    policy_weights, value_weights = ([*trained(each).values()] for each in (learner.policy, learner.value))
    steps: list[dict[str, float]] = []
    for minibatch in itertools.chain.from_iterable(itertools.repeat(minibatches, config.num_epochs)):
        if steps:
            # The first step learns from the copies that drew the rollouts.
            for module in (learner.policy, learner.value):
                cast(module, seed + len(steps))
        learner.optimizer.zero_grad()
        metrics = accumulate_gradients(learner, config, minibatch, outputs)
        outputs = None
        if hooks.pretraining:
            num_episodes = sum(len(each.scores_N) for each in minibatch)
            # A multiple of the number of ranks, so that they can divide the sequences.
            for_each = max(1, round(config.ptx.examples_per_episode * num_episodes / config.num_epochs))
            count = learner.ranks.size * for_each
            drawn = list(itertools.islice(hooks.pretraining, count))
            progress.num_sequences += count
            metrics |= ptx.accumulate(
                policy_weights, learner.policy, learner.shared, drawn, progress.gamma, config.micro_batch_tokens,
                learner.ranks,
            )  # fmt: skip
        norm = float(whole(nn.utils.clip_grad_norm_(policy_weights, config.max_grad_norm)))
        nn.utils.clip_grad_norm_(value_weights, config.max_grad_norm)
        if not (math.isfinite(metrics["policy/loss"] + metrics["val/loss"]) and math.isfinite(norm)):
            raise _NotFiniteError(f"losses and gradients must be finite: norm {norm}, {metrics}")
        learner.optimizer.step()
        steps.append(metrics | {"policy/grad_norm": norm})
    found = {name: [each[name] for each in steps if name in each] for metrics in steps for name in metrics}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _turns(prompts: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Yields the prompts of each round, in random order; each prompt is used once before any is used again."""
    drawn = random.Random(seed)
    waiting: list[Prompt] = []
    while True:
        while len(waiting) < size:
            waiting += drawn.sample(list(prompts), len(prompts))
        yield waiting[:size]
        waiting = waiting[size:]
