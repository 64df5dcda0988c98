"""What a training run works with: places it shares with others, the versions it starts from, its data and rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alignd.v1 import policy_service_pb2
from training.config import TrainingConfig
from training.dataset import Dataset
from training.policy_model import SharedLayers
from training.publish import PolicyClient, artifact_folder
from training.refresh import Fitted
from training.reward_model import RewardModel
from training.rollouts import Rollout, RolloutEngine
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from feedback.store import Store


@dataclass(frozen=True)
class Workplace:
    """What outlives a run: where things are read and written, and who may interrupt."""

    store: Store
    engine: RolloutEngine
    client: PolicyClient
    policies_dir: Path
    tokenizer: PreTrainedTokenizerBase
    between_rounds: Callable[[str], None]
    """Called with the run's id between two steps: waits while the trainer is paused, raises to end the run."""


@dataclass(frozen=True)
class Run:
    """What one run works with throughout."""

    place: Workplace
    folder: RunFolder
    config: TrainingConfig
    parents: Parents
    shared: SharedLayers
    data: Dataset


@dataclass(frozen=True)
class Parents:
    """The versions that a run starts from."""

    live: policy_service_pb2.Policy
    reference: policy_service_pb2.Policy

    @property
    def live_folder(self) -> Path:
        """Where the policy that PPO goes on from lies."""
        return artifact_folder(self.live)

    @property
    def reference_folder(self) -> Path:
        """Where the policy that KL is measured from lies."""
        return artifact_folder(self.reference)


@dataclass(frozen=True)
class Rewards:
    """What scores, and what the reference policy wrote to the held-out prompts, which it scores 0 on average."""

    model: RewardModel
    judge: RewardModel
    fitted: Fitted
    before: list[Rollout]


def find_parents(client: PolicyClient, timeout_seconds: float) -> Parents:
    """Asks serving for the live policy and for the reference policy that its lineage is measured from."""
    live = client.get("live", timeout_seconds)
    return Parents(live, client.get(f"v{live.manifest.reference_version}"))
