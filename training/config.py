"""How the trainer learns: when it starts, the reward model, PPO, and what it must show before it registers a policy.

Imports nothing heavy, so that the command line can show and refuse a configuration at once. A tiny model is trained by
other values of these fields, not by other code.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RewardModelConfig(BaseModel):
    """The reward model and its refresh."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: int = Field(20, ge=1, description="Layers of the reference policy that the reward model is built on.")
    l2: float = Field(0.5, ge=0, description="Weight of the L2 penalty on the head, which reads unit variances.")
    batch_size: int = Field(8, ge=1, description="Rankings encoded at a time.")
    max_rankings: int = Field(2000, ge=1, description="Most rankings that a refresh learns from, the newest first.")
    held_out_share: float = Field(0.35, ge=0, lt=1, description="Share of users whose rankings only measure.")


class PpoConfig(BaseModel):
    """PPO from the live policy, with KL from the reference policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int = Field(12, ge=1, description="Rounds of rollouts and update.")
    prompts_per_step: int = Field(16, ge=1, description="Prompts that rollouts are drawn for in one round.")
    rollouts_per_prompt: int = Field(4, ge=1, description="Rollouts of each of these prompts.")
    max_tokens: int = Field(64, ge=1, description="Most tokens in one rollout.")
    max_prompt_tokens: int = Field(256, ge=1, description="Prompts longer than this are left out.")
    num_epochs: int = Field(1, ge=1, description="Passes over the rollouts of one round.")
    num_minibatches: int = Field(2, ge=1, description="Optimizer steps in one pass.")
    num_frozen_layers: int = Field(20, ge=0, description="Lower layers shared with the reference, never trained.")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate of the policy after warm-up.")
    value_learning_rate: float = Field(1e-3, gt=0, description="Learning rate of the value head.")
    num_warmup_steps: int = Field(1, ge=0, description="Rounds over which both learning rates rise linearly.")
    kl_coef: float = Field(0.1, ge=0, description="Weight of the per-token KL penalty, in scores per nat.")
    missing_eos_penalty: float = Field(0.5, ge=0, description="Taken from the score of a rollout that has no end.")
    score_clip: float = Field(3.0, gt=0, description="Scores are clipped to this many standard deviations.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of later rewards.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Weight of longer estimates in GAE.")
    clip_range: float = Field(0.2, gt=0, description="The probability ratio is clipped to 1 ± this.")
    value_clip_range: float = Field(0.2, gt=0, description="New values are clipped to the old ± this.")
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    max_kl: float = Field(8.0, gt=0, description="KL from the reference, in nats a completion, at which PPO stops.")

    @model_validator(mode="after")
    def _minibatches_are_whole(self) -> Self:
        if self.prompts_per_step % self.num_minibatches:
            raise ValueError("prompts_per_step must be a multiple of num_minibatches")
        return self


class TrainingConfig(BaseModel):
    """The training service."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_new_rankings: int = Field(256, ge=1, description="New rankings that start a run.")
    poll_seconds: float = Field(1.0, gt=0, description="Seconds between two looks at the store.")
    seed: int = Field(0, ge=0, description="Seed of all that is drawn at random.")
    promote: bool = Field(True, description="Ask for the new version to go live once it is registered.")
    min_win_rate: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Win rate over the reference, by the reward model, "
        "that the lower end of the interval must pass before a version is promoted.",
    )
    num_evaluation_prompts: int = Field(64, ge=1, description="Most held-out prompts that a new policy is judged on.")
    num_probes: int = Field(4, ge=1, le=64, description="Probes in the manifest.")
    max_num_seqs: int = Field(64, ge=1, description="Most rollouts that the engine draws at once.")
    kv_cache_mib: int = Field(512, ge=16, description="Memory for the rollout engine's KV cache, in MiB.")
    reward_model: RewardModelConfig = Field(default_factory=RewardModelConfig, description="The reward model.")
    ppo: PpoConfig = Field(default_factory=PpoConfig, description="PPO.")
