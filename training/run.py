"""One training run, start to end: reward model, PPO, evaluation, and the new version handed to serving.

A run that was killed goes on from what `state/` in its folder holds: each phase that has ended is read back, and PPO
goes on from its last checkpoint, so that the result is the same, bit for bit, as without the kill (on a CPU).

Several ranks call `run` together (training.models.parallel). What only one may do, such as fit, write and ask serving,
the first one does, and the others wait for what comes of it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from alignd.v1 import policy_service_pb2
from training.context import Parents, Rewards, Run, TrainerContext
from training.data.dataset import MAX_STORED_PROMPTS, TokenizedPrompt, is_held_out, make_dataset, text_of
from training.data.groups import Group
from training.data.intervals import Verdict, mean, win_rate
from training.errors import TrainingError
from training.handover.version import KL, WIN_RATE, go_live, register, write
from training.models.parallel import led
from training.models.policy import (
    SharedLayers,
    load_model,
    load_weights,
    merged_tensors,
    merged_weights,
    reference_logprobs,
    upper_layers_of,
)
from training.models.reward import RewardModel, normalise, save, score_groups
from training.ppo import ptx
from training.ppo import rounds as ppo
from training.ppo.learner import Weights, make_learner
from training.ppo.rollouts import Rollout
from training.rewards.label_next import label_next
from training.rewards.refresh import REWARD_MODEL_FILE, Fitted, accept, fit_held_out_model, refresh
from training.runs.checkpoint import newest_checkpoint, save_checkpoint
from training.runs.folder import NUM_SAMPLE_PAIRS, RunFolder, SamplePair
from training.runs.policy_client import registered_by, written_by

logger = logging.getLogger(__name__)

MAX_UNRANKED, NUM_LABEL_NEXT = 64, 20
LEAST_HELD_OUT = 2  # of one score there is no deviation


def run(place: TrainerContext, folder: RunFolder) -> int:
    """Trains from the store's rankings and registers the result, or goes on with that. Returns its version.

    Raises TrainingError where something is not finite or there is too little to learn from; nothing is registered then.
    """
    ranks = place.ranks
    place.between_rounds(folder.path.name)
    started = _open(place, folder)
    earlier = led(ranks, lambda: _registered(started))
    if earlier:
        return led(ranks, lambda: go_live(started, earlier))
    rewards = _rewards(started)
    place.between_rounds(folder.path.name)
    led(ranks, lambda: _name_what_to_label(started, rewards.model))
    prompts = _evaluation_prompts(started)
    weights = _optimise(started, rewards)
    place.between_rounds(folder.path.name)
    # A prompt's seed is the first and its place: these begin where those of the reference's answers end.
    after = led(ranks, lambda: _sample(started, prompts, started.config.seed + len(prompts)))
    verdict = _evaluate(started, rewards, prompts, after)
    place.between_rounds(folder.path.name)
    written = led(ranks, lambda: write(started, rewards, weights, verdict, prompts))
    return led(ranks, lambda: go_live(started, register(started, written)))


def _registered(run: Run) -> policy_service_pb2.Policy | None:
    """The version that an earlier attempt has made, registered by now; None if none has come so far."""
    registered = registered_by(run.place.client, run.folder.path.name)
    if registered:
        return registered
    written = written_by(run.place.policies_dir, run.folder.path.name)
    return register(run, written) if written else None


def _open(place: TrainerContext, folder: RunFolder) -> Run:
    config, origin = folder.config(), folder.origin()
    torch.manual_seed(config.seed)
    # An index's backward pass adds in whatever order threads come, unless told otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    versions = (f"v{origin.live_version}", f"v{origin.reference_version}")
    parents = Parents(*led(place.ranks, lambda: [place.client.get(version) for version in versions]))
    data = make_dataset(
        place.tokenizer,
        place.store.ranked_groups(
            up_to_seq=origin.last_ranking_seq,
            up_to_sample_seq=origin.last_sample_seq,
            newest=config.reward_model.max_rankings,
        ),
        place.store.prompts(MAX_STORED_PROMPTS, up_to_seq=origin.last_sample_seq),
        held_out_share=config.reward_model.held_out_share,
        max_prompt_tokens=config.ppo.max_prompt_tokens,
        max_group_tokens=config.reward_model.micro_batch_tokens,
    )
    if not (data.training and data.training_prompts and len(data.held_out_prompts) >= LEAST_HELD_OUT):
        raise TrainingError(
            f"too little to learn from: {len(data.training)} rankings with a comparison, "
            f"{len(data.training_prompts)} prompts to train on, {len(data.held_out_prompts)} held out "
            f"of {LEAST_HELD_OUT} at least"
        )
    return Run(place, folder, config, parents, SharedLayers(load_model(parents.reference_folder)), data)


def _evaluation_prompts(run: Run) -> tuple[TokenizedPrompt, ...]:
    return run.data.held_out_prompts[: run.config.num_evaluation_prompts]


def _rewards(run: Run) -> Rewards:
    """Reads the reward model, refreshed and normalised, which the first rank makes unless an earlier attempt has."""
    config, folder, shared = run.config.reward_model, run.folder, run.shared
    led(run.place.ranks, lambda: _make_rewards(run))
    found = newest_checkpoint(folder.state / "rewards")
    assert found
    model, held_out_model = RewardModel(shared, config), RewardModel(shared, config.model_copy(update=HEADS_ALONE))
    for each, prefix in ((model, "model."), (held_out_model, "held_out_model.")):
        each.load_state_dict({n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)})
    before = [Rollout(tuple(each[0]), tuple(each[1]), each[2]) for each in found.facts["before"]]
    return Rewards(model, held_out_model, Fitted.of_json(found.facts["fitted"]), before)


def _make_rewards(run: Run) -> None:
    folder = run.folder
    found = newest_checkpoint(folder.state / "rewards")
    if found:
        accept(folder.path.parent, Fitted.of_json(found.facts["fitted"]))
        return
    folder.rewind("reward_model", 0)
    rewards = _fit(run)
    tensors = {f"model.{name}": tensor for name, tensor in rewards.model.state_dict().items()}
    tensors |= {f"held_out_model.{name}": tensor for name, tensor in rewards.held_out_model.state_dict().items()}
    drawn = [[list(each.token_ids), list(each.logprobs), each.finished] for each in rewards.before]
    save_checkpoint(folder.state / "rewards", 0, tensors, {"before": drawn, "fitted": asdict(rewards.fitted)})
    accept(folder.path.parent, rewards.fitted)


HEADS_ALONE = {"num_trained_layers": 0}


def _fit(run: Run) -> Rewards:
    config, folder, shared = run.config, run.folder, run.shared
    digest = run.parents.reference.manifest.weight_digest
    model, fitted = refresh(
        config.reward_model, shared, run.data, folder.path, digest, seed=config.seed, log=folder.log
    )
    held_out_model = fit_held_out_model(
        config.reward_model, shared, run.data.held_out or run.data.training, seed=config.seed
    )
    run.place.engine.load_weights(load_weights(run.parents.reference_folder).items())
    prompts = _evaluation_prompts(run)
    before = _sample(run, prompts, config.seed)
    references = _groups(prompts, before)
    deviation = normalise(model, torch.cat(score_groups(model, references)))
    if fitted.run_id == folder.path.name:
        # Again, normalised: whoever loads it from here, such as SFT, gets the scores that this run gets.
        fitted = replace(fitted, digest=save(model, folder.path / REWARD_MODEL_FILE, digest))
    normalise(held_out_model, torch.cat(score_groups(held_out_model, references)))
    folder.log("normalise", 0, 1, {"reward_model/reference_std": deviation})
    return Rewards(model, held_out_model, fitted, before)


def _name_what_to_label(run: Run, model: RewardModel) -> None:
    origin = run.folder.origin()
    unranked = run.place.store.unranked(MAX_UNRANKED, origin.last_ranking_seq, origin.last_sample_seq)
    # Rankings of prompts or by users that are held out would teach nothing; a sample is its own user's to rank.
    teaching = [
        each
        for each in unranked
        if text_of(each.prompt) not in run.data.held_out_texts
        and not is_held_out(each.user_id, run.config.reward_model.held_out_share)
    ]
    found = label_next(
        model, run.place.tokenizer, teaching,
        max_prompt_tokens=run.config.ppo.max_prompt_tokens,
        max_group_tokens=run.config.reward_model.micro_batch_tokens,
    )  # fmt: skip
    run.folder.write_label_next(found[:NUM_LABEL_NEXT])


def _sample(run: Run, prompts: Sequence[TokenizedPrompt], seed: int) -> list[Rollout]:
    """One completion of each prompt by what is in the engine."""
    return [rollouts[0] for rollouts in _draw(run, [prompt.token_ids for prompt in prompts], 1, seed)]


def _draw(run: Run, prompts: Sequence[Sequence[int]], num_completions: int, seed: int) -> list[list[Rollout]]:
    return run.place.engine.sample(
        prompts,
        num_completions=num_completions,
        max_tokens=run.config.ppo.max_tokens,
        seed=seed,
        eos_token_id=run.place.tokenizer.eos_token_id,
    )


def _groups(prompts: Sequence[TokenizedPrompt], rollouts: Sequence[Rollout]) -> list[Group]:
    return [Group(p.token_ids, (rollout.token_ids,)) for p, rollout in zip(prompts, rollouts, strict=True)]


def _optimise(run: Run, rewards: Rewards) -> Weights:
    """PPO, from the live policy's weights or from where a killed attempt had come. The first rank gets the new ones."""
    config, folder, shared, ranks = run.config.ppo, run.folder, run.shared, run.place.ranks
    frozen = min(config.num_frozen_layers, shared.num_layers - 1)
    # Adapters start at random: alike on all ranks, whichever fitted the reward model, and in every attempt.
    torch.manual_seed(run.config.seed)
    policy = upper_layers_of(run.parents.live_folder, shared, frozen, config.lora, ranks)
    learner = make_learner(policy, rewards.model, rewards.held_out_model, config, ranks)
    checkpoints = folder.state / "ppo"
    found = newest_checkpoint(checkpoints)
    led(ranks, lambda: folder.rewind("ppo", found.round if found else 0))
    hooks = ppo.PpoHooks(
        prompts=[prompt.token_ids for prompt in run.data.training_prompts],
        sample=lambda prompts, seed: _draw(run, prompts, config.rollouts_per_prompt, seed),
        load_weights=run.place.engine.load_weights,
        log=lambda index, count, metrics: led(ranks, lambda: _log_round(folder, index, count, metrics)),
        pretraining=_pretraining(run),
        checkpoints=checkpoints,
        between_rounds=lambda: run.place.between_rounds(folder.path.name),
    )
    ppo.train(learner, config, hooks, seed=run.config.seed)
    # What is evaluated is what will be served.
    run.place.engine.load_weights(merged_tensors(shared, policy))
    return merged_weights(shared, policy, kept=ranks.leads)


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
    return ptx.sequences(texts, run.place.tokenizer, config.sequence_tokens)


def _evaluate(run: Run, rewards: Rewards, prompts: Sequence[TokenizedPrompt], after: Sequence[Rollout]) -> Verdict:
    """The new policy against the reference on held-out prompts, by the reward model; writes samples of both."""
    groups = _groups(prompts, after)
    scores, reference_scores = (
        torch.cat(score_groups(rewards.model, each)).tolist() for each in (groups, _groups(prompts, rewards.before))
    )
    by_reference = reference_logprobs(run.shared, groups)
    log_ratios = [sum(each.logprobs) - logprob for each, logprob in zip(after, by_reference, strict=True)]
    verdict = Verdict(win_rate(scores, reference_scores), mean(log_ratios))
    led(run.place.ranks, lambda: _write_evaluation(run, rewards, prompts, after, verdict))
    return verdict


def _write_evaluation(
    run: Run, rewards: Rewards, prompts: Sequence[TokenizedPrompt], after: Sequence[Rollout], verdict: Verdict
) -> None:
    run.folder.rewind("evaluate", 0)
    won = verdict.won
    metrics = {WIN_RATE: won.value, "low": won.low, "high": won.high, KL: verdict.kl.value}
    run.folder.log("evaluate", 0, 1, metrics | {"wins": won.wins, "ties": won.ties, "losses": won.losses})
    rows = itertools.islice(zip(prompts, rewards.before, after, strict=True), NUM_SAMPLE_PAIRS)
    run.folder.write_samples([SamplePair(prompt.text, _decode(run, b), _decode(run, a)) for prompt, b, a in rows])


def _decode(run: Run, rollout: Rollout) -> str:
    return str(run.place.tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True))
