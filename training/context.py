"""What a training run works with: places it shares with others, the versions it starts from, its data and rewards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alignd.v1 import policy_service_pb2
from policies.location import artifact_folder
from training.config import TrainingConfig
from training.data.dataset import Dataset, TokenizedPrompt
from training.data.groups import Group
from training.models.parallel import Ranks, led
from training.models.policy import SharedLayers
from training.models.reward import RewardModel
from training.ppo.rollouts import Draw, Rollout, RolloutEngine
from training.rewards.refresh import Fitted
from training.runs.folder import RunFolder
from training.runs.policy_client import START_SECONDS, PolicyClient

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from feedback.store.reader import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerContext:
    """What outlives a run: where things are read and written, and who may interrupt."""

    store: Store
    draw: Draw
    client: PolicyClient
    policies_dir: Path
    tokenizer: PreTrainedTokenizerBase
    between_rounds: Callable[[str], None]
    """Called with the run's id between two rounds or phases: waits while the trainer is paused, raises to end the run.
    """
    ranks: Ranks
    """The first of them alone talks to serving and writes; all call `between_rounds`."""

    def text(self, rollout: Rollout) -> str:
        """Returns what a user would read of a completion."""
        return str(self.tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True))


@dataclass(frozen=True)
class Run:
    """What one run works with throughout."""

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

    def groups(self, answers: Sequence[Rollout]) -> list[Group]:
        """Returns the evaluation prompts, each with its answer."""
        pairs = zip(self.evaluation_prompts, answers, strict=True)
        return [Group(prompt.token_ids, (answer.token_ids,)) for prompt, answer in pairs]


@dataclass(frozen=True)
class Parents:
    """The versions that a run starts from."""

    live: policy_service_pb2.Policy
    reference: policy_service_pb2.Policy

    @property
    def live_folder(self) -> Path:
        """Where the policy that PPO goes on from lies."""
        return artifact_folder(self.live.artifact_uri)

    @property
    def reference_folder(self) -> Path:
        """Where the policy that KL is measured from lies."""
        return artifact_folder(self.reference.artifact_uri)


@dataclass(frozen=True)
class Rewards:
    """What scores, and what the reference policy wrote to the held-out prompts, which it scores 0 on average."""

    model: RewardModel
    held_out_model: RewardModel
    fitted: Fitted
    before: list[Rollout]


def find_parents(client: PolicyClient, timeout_seconds: float) -> Parents:
    """Asks serving for the live policy and for the reference policy that its lineage is measured from."""
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
    """Starts the rollout engine while rankings are still coming in, but not while the server starts its own.

    Of several ranks the first one's `config` counts, and its `between_rounds` alone is called.
    """
    # Takes seconds to import.
    from transformers import AutoTokenizer

    def ask() -> tuple[TrainingConfig, Path, Path]:
        if not client.is_serving():
            logger.info("waiting for the server to serve a policy")
        while not client.is_serving():
            time.sleep(config.poll_seconds)
        parents = find_parents(client, START_SECONDS)
        return config, parents.live_folder, parents.reference_folder

    agreed, live_folder, reference_folder = led(ranks, ask)
    tokenizer = AutoTokenizer.from_pretrained(reference_folder, local_files_only=True)
    engine = RolloutEngine(
        live_folder,
        max_model_len=agreed.ppo.max_prompt_tokens + agreed.ppo.max_tokens,
        max_num_seqs=agreed.max_num_seqs,
        kv_cache_mib=agreed.kv_cache_mib,
        eos_token_id=tokenizer.eos_token_id,
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
