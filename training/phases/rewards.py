"""The rewards phase of a run: fits and normalises both reward models, or reads them back from `state/`."""

from __future__ import annotations

from dataclasses import asdict, replace
from statistics import fmean

import torch

from training.context import Rewards, Run
from training.data.best_of_n import best_of_n
from training.data.split import Side, side_of
from training.models.reward import RewardModel, normalise, save, score_groups
from training.models.tensor_file import load_weights
from training.ppo.rollouts import from_rows, to_rows
from training.rewards.label_next import label_next
from training.rewards.refresh import REWARD_MODEL_FILE, Fitted, accept, fit_held_out_model, refresh
from training.runs.checkpoint import newest_checkpoint, save_checkpoint

_MAX_UNRANKED, _NUM_LABEL_NEXT = 64, 20
_HEADS_ALONE = {"num_trained_layers": 0}


def load_rewards(run: Run) -> Rewards | None:
    """Reads back what `make_rewards` has written; returns None if it has written nothing yet."""
    config = run.config.reward_model
    found = newest_checkpoint(run.folder.state / "rewards")
    if found is None:
        return None
    model, held_out_model = (RewardModel(run.shared, each) for each in (config, config.model_copy(update=_HEADS_ALONE)))
    for each, prefix in ((model, "model."), (held_out_model, "held_out_model.")):
        each.load_state_dict({n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)})
    fitted = Fitted.of_json(found.facts["fitted"])
    if run.context.ranks.leads:
        # Accepted again: the attempt that wrote it may have been killed before it could accept it.
        accept(run.folder.path.parent, fitted)
    return Rewards(model, held_out_model, fitted, from_rows(found.facts["before"]))


def make_rewards(run: Run) -> Rewards:
    """Refreshes the reward model, fits the held-out one, normalises both, and lists what to label next."""
    run.folder.rewind("reward_model", 0)
    rewards = _fit(run)
    _name_what_to_label(run, rewards.model)
    tensors = {f"model.{name}": tensor for name, tensor in rewards.model.state_dict().items()}
    tensors |= {f"held_out_model.{name}": tensor for name, tensor in rewards.held_out_model.state_dict().items()}
    facts = {"before": to_rows(rewards.before), "fitted": asdict(rewards.fitted)}
    save_checkpoint(run.folder.state / "rewards", 0, tensors, facts)
    accept(run.folder.path.parent, rewards.fitted)
    return rewards


def _fit(run: Run) -> Rewards:
    config, folder, shared = run.config, run.folder, run.shared
    digest = run.parents.reference.manifest.weight_digest
    model, fitted = refresh(
        config.reward_model, shared, run.data, folder.path, digest, seed=config.seed, log=folder.log
    )
    held_out_model = fit_held_out_model(
        config.reward_model, shared, run.data.held_out or run.data.training, seed=config.seed
    )
    before = run.context.draw(run.ask(load_weights(run.parents.reference_folder), again=False))
    references = run.groups(before)
    deviation = normalise(model, torch.cat(score_groups(model, references)))
    if fitted.run_id == folder.path.name:
        # Saved again, now normalised: whoever loads it from here, such as SFT, gets the same scores as this run.
        fitted = replace(fitted, digest=save(model, folder.path / REWARD_MODEL_FILE, digest))
    normalise(held_out_model, torch.cat(score_groups(held_out_model, references)))
    rewards = Rewards(model, held_out_model, fitted, before)
    folder.log("normalise", 0, 1, {"reward_model/reference_std": deviation, "best_of_n": _best_of_n(run, rewards)})
    return rewards


def _best_of_n(run: Run, rewards: Rewards) -> list[list[float]]:
    """Returns how both reward models score the reference policy's best of n by the reward model, as PPO is to do."""
    scores, held_out_scores = (run.scores(each, rewards.before) for each in (rewards.model, rewards.held_out_model))
    by_both = zip(best_of_n(scores, scores), best_of_n(scores, held_out_scores), strict=True)
    return [[one.n, one.kl, fmean(one.values), fmean(other.values)] for one, other in by_both]


def _name_what_to_label(run: Run, model: RewardModel) -> None:
    """Writes which unranked samples would teach the reward model most."""
    origin = run.folder.origin()
    unranked = run.context.store.unranked(_MAX_UNRANKED, origin.last_ranking_seq, origin.last_sample_seq)
    # The model learns nothing from rankings of held-out prompts or by held-out users; only its user ranks a sample.
    share = run.config.reward_model.held_out_share
    teaching = [each for each in unranked if side_of(each.user_id, each.first_user_id, share) is Side.LEARNED]
    found = label_next(
        model, run.context.tokenizer, teaching,
        max_prompt_tokens=run.config.ppo.max_prompt_tokens,
        max_group_tokens=run.config.reward_model.micro_batch_tokens,
    )  # fmt: skip
    run.folder.write_label_next(found[:_NUM_LABEL_NEXT])
