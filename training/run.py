"""One training run, start to end: reward model, PPO, evaluation, and the new version handed to serving.

A run that was killed is resumed from what its folder has in `state/`: the result of each phase that has ended is read
back, and PPO resumes from its last checkpoint. On a CPU the run's result is the same, bit for bit, as without the kill.

Several ranks call `run` together (training.models.parallel, training.phases).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from training.context import Parents, Run, TrainerContext
from training.data.census import Census, figures, sentences, write_census
from training.data.dataset import MAX_STORED_PROMPTS, Dataset, make_dataset
from training.errors import TrainingError
from training.handover.verdict import draw_answers, evaluate, load_answers
from training.handover.version import go_live, hand_over, is_made, reason_of, write_version
from training.models.policy import SharedLayers, load_model
from training.phases.policy import optimise
from training.phases.rewards import load_rewards, make_rewards
from training.phases.runner import Phase, perform
from training.runs.folder import Origin, RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from feedback.store.reader import Store
    from training.config import TrainingConfig

_LEAST_HELD_OUT = 2  # a single score has no standard deviation


def run(context: TrainerContext, folder: RunFolder) -> int:
    """Trains from the store's rankings, or resumes that, and registers the result. Returns its version.

    Raises:
        TrainingError: a loss or a gradient is not finite, or there is too little to learn from. Nothing is registered.
    """
    run_id = folder.path.name
    if not perform(context, run_id, Phase("look for its version", lambda: is_made(context, run_id))):
        this = _open(context, folder)
        rewards = perform(
            context, run_id, Phase("rewards", lambda: make_rewards(this), load=lambda: load_rewards(this))
        )
        weights = perform(context, run_id, Phase("policy", lambda: optimise(this, rewards), collective=True))
        answers = perform(
            context, run_id, Phase("answers", lambda: draw_answers(this, weights), load=lambda: load_answers(this))
        )
        verdict = perform(context, run_id, Phase("verdict", lambda: evaluate(this, rewards, answers), collective=True))
        perform(context, run_id, Phase("version", lambda: write_version(this, rewards, weights, verdict)))
    return perform(
        context, run_id, Phase("registration", lambda: go_live(context, folder, hand_over(context, folder, reason_of)))
    )


def _open(context: TrainerContext, folder: RunFolder) -> Run:
    """Returns what the run works with, the same in every attempt."""
    config, origin = folder.config(), folder.origin()
    torch.manual_seed(config.seed)
    # Without this, the backward pass of indexing adds gradients in whatever order the threads come.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    parents = perform(
        context,
        folder.path.name,
        Phase(
            "parents",
            lambda: Parents(
                context.client.get(f"v{origin.live_version}"), context.client.get(f"v{origin.reference_version}")
            ),
        ),
    )
    data = _read(context.store, context.tokenizer, config, origin)
    if context.ranks.leads and not folder.has_logged("data"):
        write_census(folder, _whole(context.store, data.censuses, origin))
    if not (data.training and data.training_prompts and len(data.held_out_prompts) >= _LEAST_HELD_OUT):
        raise TrainingError(
            f"too little to learn from: {len(data.training)} rankings with a comparison, "
            f"{len(data.training_prompts)} prompts to train on, {len(data.held_out_prompts)} held-out prompts "
            f"(at least {_LEAST_HELD_OUT} are needed). Of what was read: {'; '.join(sentences(figures(data.censuses)))}"
        )
    return Run(context, folder, config, parents, SharedLayers(load_model(parents.reference_folder)), data)


def _read(store: Store, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig, origin: Origin) -> Dataset:
    """Reads what there was when the run began."""
    groups = store.ranked_groups(
        up_to_seq=origin.last_ranking_seq,
        up_to_sample_seq=origin.last_sample_seq,
        newest=config.reward_model.max_rankings,
    )
    prompts = store.prompts(MAX_STORED_PROMPTS, up_to_seq=origin.last_sample_seq)
    return make_dataset(
        tokenizer, groups, prompts,
        held_out_share=config.reward_model.held_out_share,
        max_prompt_tokens=config.ppo.max_prompt_tokens,
        max_group_tokens=config.reward_model.micro_batch_tokens,
    )  # fmt: skip


def _whole(store: Store, censuses: tuple[Census, Census], origin: Origin) -> list[Census]:
    """Returns the censuses with what the store had and `_read` did not get, by reason."""
    rankings, prompts = censuses
    tally = store.tally_rankings(origin.last_ranking_seq, origin.last_sample_seq)
    older = tally.stored - tally.no_sample - tally.superseded - rankings.num_read
    num_prompts = store.num_prompts(origin.last_sample_seq)
    return [
        rankings.with_unread(no_sample=tally.no_sample, superseded=tally.superseded, older=older),
        prompts.with_unread(older=num_prompts - prompts.num_read),
    ]
