"""The context of a training run: what all runs share, the versions it starts from, its data and its rewards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignd.v1 import policy_service_pb2
from feedback import heartbeat
from policies.end_tokens import end_tokens
from policies.location import artifact_folder
from training.config import TrainingConfig
from training.data.dataset import Dataset, TokenizedPrompt
from training.data.groups import Group
from training.models.parallel import Ranks, led
from training.models.policy import SharedLayers
from training.models.reward import RewardModel, score_groups
from training.ppo.rollouts import Draw, Request, Rollout, RolloutEngine
from training.rewards.refresh import Fitted
from training.runs.folder import RunFolder
from training.runs.policy_client import START_SECONDS, PolicyClient

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from feedback.store.reader import Store

logger = logging.getLogger(__name__)

Answers = Sequence[Sequence[Rollout]]
"""A policy's completions of each evaluation prompt."""


@dataclass(frozen=True)
class TrainerContext:
    """What all runs of a trainer share: the store, the sampler, serving, and the call by which operators interrupt."""

    store: Store
    draw: Draw
    client: PolicyClient
    policies_dir: Path
    tokenizer: PreTrainedTokenizerBase
    between_rounds: Callable[[str], None]
    """Called with the run's id between two rounds or phases: waits while the trainer is paused, raises to end the run.
    """
    ranks: Ranks
    """Only the first rank calls serving and writes files; all ranks call `between_rounds`."""

    def text(self, rollout: Rollout) -> str:
        """Returns a completion as the text that a user would read."""
        return str(self.tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True))


@dataclass(frozen=True)
class Run:
    """What one run works with from start to end."""

    context: TrainerContext
    folder: RunFolder
    config: TrainingConfig
    parents: Parents
    shared: SharedLayers
    data: Dataset

    @property
    def evaluation_prompts(self) -> tuple[TokenizedPrompt, ...]:
        """The held-out prompts that policies are compared on."""
        return self.data.held_out_prompts[: self.config.num_evaluation_prompts]

    def ask(self, weights: Mapping[str, Tensor], *, again: bool) -> Request:
        """Asks for answers to the evaluation prompts by a policy of these weights.

        The second policy that is asked, `again`, gets other seeds than the first.
        """
        prompts, each = self.evaluation_prompts, self.config.completions_per_evaluation_prompt
        seed = self.config.seed + (len(prompts) * each if again else 0)
        asked = [prompt.token_ids for prompt in prompts]
        return Request(weights.items(), asked, each, self.config.ppo.max_tokens, seed)

    def groups(self, answers: Answers) -> list[Group]:
        """Returns the evaluation prompts with their answers, in rows that are no longer than PPO's."""
        most = self.config.ppo.rollouts_per_prompt
        return [
            Group(prompt.token_ids, tuple(answer.token_ids for answer in each[start : start + most]))
            for prompt, each in zip(self.evaluation_prompts, answers, strict=True)
            for start in range(0, len(each), most)
        ]

    def scores(self, model: RewardModel, answers: Answers) -> list[list[float]]:
        """Returns the scores of the answers to each evaluation prompt."""
        found = iter(torch.cat(score_groups(model, self.groups(answers))).tolist())
        return [[next(found) for _ in each] for each in answers]


@dataclass(frozen=True)
class Parents:
    """The versions that a run starts from."""

    live: policy_service_pb2.Policy
    reference: policy_service_pb2.Policy

    @property
    def live_folder(self) -> Path:
        """The folder of the policy that PPO starts from."""
        return artifact_folder(self.live.artifact_uri)

    @property
    def reference_folder(self) -> Path:
        """The folder of the policy that KL is measured from."""
        return artifact_folder(self.reference.artifact_uri)


@dataclass(frozen=True)
class Rewards:
    """Both reward models, and the reference policy's answers to the held-out prompts, whose mean score is 0."""

    model: RewardModel
    held_out_model: RewardModel
    fitted: Fitted
    before: Answers


def find_parents(client: PolicyClient, timeout_seconds: float) -> Parents:
    """Asks serving for the live policy, and for the reference policy that its KL is measured from."""
    live = client.get("live", timeout_seconds)
    return Parents(live, client.get(f"v{live.manifest.reference_version}"))


def open_context(
    config: TrainingConfig,
    store: Store,
    client: PolicyClient,
    policies_dir: Path,
    between_rounds: Callable[[str], None],
    ranks: Ranks,
) -> TrainerContext:
    """Waits until the server is ready, starts the rollout engine, and returns the context.

    The two engines do not start at the same time. Of several ranks only the first one's `config` and `between_rounds`
    are used.
    """
    # Takes seconds to import.
    from transformers import AutoTokenizer

    def ask() -> tuple[TrainingConfig, Path, Path]:
        if not client.is_serving():
            logger.info("waiting for the server to serve a policy")
        while not client.is_serving():
            heartbeat.wait(config.poll_seconds)
        parents = find_parents(client, START_SECONDS)
        return config, parents.live_folder, parents.reference_folder

    agreed, live_folder, reference_folder = led(ranks, ask)
    tokenizer = AutoTokenizer.from_pretrained(reference_folder, local_files_only=True)
    engine = RolloutEngine(
        live_folder,
        max_model_len=agreed.ppo.max_prompt_tokens + agreed.ppo.max_tokens,
        max_num_seqs=agreed.max_num_seqs,
        kv_cache_mib=agreed.kv_cache_mib,
        end_token_ids=end_tokens(tokenizer).token_ids,
        seed=agreed.seed,
        ranks=ranks,
    )
    return TrainerContext(
        store,
        engine.draw,
        client,
        policies_dir,
        tokenizer,
        lambda run_id: led(ranks, lambda: between_rounds(run_id)),
        ranks,
    )
