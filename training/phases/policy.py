"""The PPO phase of a run: from the live policy's weights, or the last checkpoint, to the new policy's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from training.context import Rewards, Run
from training.models.masters import Weights, noise_source
from training.models.parallel import led
from training.models.policy import merged_weights
from training.ppo import ptx
from training.ppo import rounds as ppo
from training.ppo.learner import load_policy, make_learner
from training.runs.checkpoint import newest_checkpoint
from training.runs.folder import RunFolder

logger = logging.getLogger(__name__)


def optimise(run: Run, rewards: Rewards) -> Weights:
    """Returns the new policy's weights, whole and in bf16 as they will be served; only the first rank gets them."""
    config, folder, shared, ranks = run.config.ppo, run.folder, run.shared, run.context.ranks
    # Adapters start at random. This makes them the same on all ranks, whichever fitted the reward model, and in every
    # attempt.
    torch.manual_seed(run.config.seed)
    policy = load_policy(run.parents.live_folder, shared, config, ranks)
    learner = make_learner(policy, rewards.model, rewards.held_out_model, config, ranks)
    checkpoints = folder.state / "ppo"
    found = newest_checkpoint(checkpoints)
    led(ranks, lambda: folder.rewind("ppo", found.round if found else 0))
    hooks = ppo.PpoHooks(
        prompts=[prompt.token_ids for prompt in run.data.training_prompts],
        draw=run.context.draw,
        log=lambda index, count, metrics: led(ranks, lambda: _log_round(folder, index, count, metrics)),
        pretraining=_pretraining(run),
        checkpoints=checkpoints,
        between_rounds=lambda: run.context.between_rounds(folder.path.name),
    )
    ppo.train(learner, config, hooks, seed=run.config.seed)
    noise = noise_source(shared.device, run.config.seed) if config.stochastic_rounding else None
    return merged_weights(shared, policy, noise=noise, kept=ranks.leads)


def _log_round(folder: RunFolder, index: int, count: int, metrics: dict[str, Any]) -> None:
    folder.log("ppo", index, count, metrics)
    logger.info(
        "round %d of %d: score %.2f  kl %.2f  len %.0f  clipfrac %.3f", index + 1, count,
        metrics["objective/score"], metrics["objective/kl"], metrics["completion/length"],
        metrics.get("policy/clipfrac", 0.0),
    )  # fmt: skip


def _pretraining(run: Run) -> Iterator[tuple[int, ...]] | None:
    config = run.config.ppo.ptx
    if not config.data:
        return None
    texts = ptx.pretraining_texts(config, run.config.seed)
    return ptx.sequences(texts, run.context.tokenizer, config.sequence_tokens)
