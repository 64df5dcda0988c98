"""The trainer's settings: when a run starts, how the reward model, PPO and SFT learn, and when a policy is promoted.

This module imports nothing heavy, so that the command line can show or refuse a configuration at once. A tiny model is
trained with other values of these fields, not by other code; training/recipes has a file of values for each size of
machine.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RewardModelConfig(BaseModel):
    """The reward model and its refresh."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: int = Field(
        20, ge=1, description="Lower layers of the reference policy that the reward model is built on."
    )
    num_trained_layers: int = Field(
        0,
        ge=0,
        description="How many of these layers, the uppermost, are copied and trained. With 0 only the heads are "
        "fitted, a convex problem: best below about a thousand rankings.",
    )
    num_heads: int = Field(
        8,
        ge=2,
        description="Heads, each fitted to the rankings with random weights. Where the heads differ, the reward model "
        "is unsure.",
    )
    l2: float = Field(0.5, ge=0, description="Weight of the L2 penalty on the heads, whose inputs have variance 1.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate of trained layers; cosine to 10 %.")
    head_learning_rate: float = Field(
        1e-3, gt=0, description="Peak learning rate of the heads while layers are trained."
    )
    batch_size: int = Field(8, ge=1, description="Rankings in one optimizer step, where layers are trained.")
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Most tokens of a ranking, its prompt and all completions together; of a longer ranking the "
        "longest completions are left out. Where layers are trained, also the most tokens in one forward pass; "
        "gradients are accumulated.",
    )
    max_rankings: int = Field(2000, ge=1, description="Most rankings that a refresh learns from, the newest first.")
    replay_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Where layers are trained: share of a refresh's rankings that an earlier one has learned from.",
    )
    max_labeler_share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="A labeler who gave more than this share of the rankings counts as if they had given this share.",
    )
    held_out_share: float = Field(
        0.35, ge=0, lt=1, description="Share of users who are held out: their rankings only measure."
    )
    max_accuracy_drop: float = Field(
        0.0, ge=0, le=1, description="A refresh is refused if held-out accuracy falls by more than this."
    )


class LoraConfig(BaseModel):
    """Low-rank adapters in place of full weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(0, ge=0, description="Rank of the adapters; 0 trains full weights.")
    alpha: float = Field(16.0, gt=0, description="Scale of the adapters, divided by the rank.")


class PtxConfig(BaseModel):
    """The pretraining mix of PPO-ptx (InstructGPT, equation 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(
        "",
        description="Pretraining text: a .txt, .jsonl or .parquet file, each optionally .gz, or hf:name or "
        "hf:name:part of a Hugging Face dataset; empty for plain PPO.",
    )
    text_field: str = Field(
        "text", min_length=1, description="Name of the field that has the text, in .jsonl, .parquet and datasets."
    )
    examples_per_episode: float = Field(
        1.0,
        gt=0,
        description="Pretraining sequences per rollout, all epochs together; at least one for each process and "
        "optimizer step. InstructGPT: 8.",
    )
    sequence_tokens: int = Field(128, ge=2, description="Tokens in one pretraining sequence.")
    gamma: float | None = Field(
        None, ge=0, description="Weight of the pretraining gradient; not set: calibrated by grad_norm_ratio."
    )
    grad_norm_ratio: float = Field(
        1.0,
        gt=0,
        description="Where gamma is calibrated: norm of the weighted pretraining gradient, divided by that of PPO's.",
    )
    num_calibration_steps: int = Field(4, ge=1, description="Optimizer steps over which gamma is calibrated.")


class PpoConfig(BaseModel):
    """PPO, which starts from the live policy and is penalised for KL from the reference policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_rounds: int = Field(24, ge=1, description="Rounds of rollouts and update.")
    prompts_per_round: int = Field(16, ge=1, description="Prompts that rollouts are drawn for in one round.")
    rollouts_per_prompt: int = Field(4, ge=1, description="Rollouts of each of these prompts.")
    max_tokens: int = Field(64, ge=1, description="Most tokens in one rollout.")
    max_prompt_tokens: int = Field(256, ge=1, description="Prompts longer than this are left out.")
    num_epochs: int = Field(1, ge=1, description="Epochs over the rollouts of one round.")
    num_minibatches: int = Field(4, ge=1, description="Optimizer steps in one epoch.")
    micro_batch_tokens: int = Field(
        4096, ge=1, description="Most tokens, padding included, in one forward pass; gradients are accumulated."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute the policy's activations again in the backward pass, in place of keeping them; the value "
        "model's are kept.",
    )
    num_frozen_layers: int = Field(20, ge=0, description="Lower layers shared with the reference, never trained.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Adapters in place of full weights.")
    learning_rate: float = Field(2e-4, gt=0, description="Learning rate of the policy after warm-up.")
    value_learning_rate: float = Field(1e-3, gt=0, description="Learning rate of the value model after warm-up.")
    num_warmup_rounds: int = Field(1, ge=0, description="First rounds, over which both learning rates rise linearly.")
    num_decay_rounds: int = Field(
        6,
        ge=0,
        description="Last rounds, over which both learning rates fall linearly, in the last to a tenth. In a short run "
        "fewer: there is one round of the full rate.",
    )
    stochastic_rounding: bool = Field(
        True,
        description="Where models compute in bf16: cast trained weights once an optimizer step, up or down at random, "
        "so that the smallest steps count too. If false, each pass rounds them to the nearest.",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of the running average of weights that is the result; with 0 the last weights are.",
    )
    kl_coef: float = Field(0.05, ge=0, description="Weight of the per-token KL penalty, in scores per nat.")
    final_kl_coef: float | None = Field(
        None, ge=0, description="kl_coef of the last round, to which it moves linearly; not set: it stays."
    )
    target_kl: float | None = Field(
        None, gt=0, description="KL in nats a completion to which kl_coef is adapted; not set: kl_coef is fixed."
    )
    kl_horizon: int = Field(
        1000, ge=1, description="Rollouts over which kl_coef is adapted: the more, the slower it changes."
    )
    missing_eos_penalty: float = Field(
        0.5, ge=0, description="Subtracted from the score of a rollout that has no end token."
    )
    score_clip: float = Field(3.0, gt=0, description="Scores are clipped to this many standard deviations.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of later rewards.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of GAE: the weight of longer estimates.")
    clip_range: float = Field(0.2, gt=0, description="The probability ratio is clipped to 1 ± this.")
    value_clip_range: float = Field(0.2, gt=0, description="New values are clipped to the old values ± this.")
    value_coef: float = Field(
        0.1,
        ge=0,
        description="Weight of the value loss. AdamW cancels a constant factor, so this only decides when the value "
        "model's gradient is clipped; value_learning_rate decides how fast it learns.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    importance_cap: float = Field(
        2.0, ge=1, description="Greatest weight of a token that is likelier by the trainer than by the sampler."
    )
    max_kl: float = Field(20.0, gt=0, description="KL from the reference, in nats a completion, above which PPO stops.")
    max_sampler_gap: float = Field(
        0.3,
        gt=0,
        description="Mean difference between the sampler's and the trainer's log-probabilities, in nats a token, "
        "above which PPO stops.",
    )
    max_held_out_drop: float = Field(
        3.0,
        gt=0,
        description="PPO stops when the score by the held-out reward model is more than this many standard errors "
        "below its best, while the score by the reward model is above what it was in that best round.",
    )
    checkpoint_every_rounds: int = Field(
        1, ge=1, description="Rounds between two checkpoints, from which a killed run resumes."
    )
    ptx: PtxConfig = Field(default_factory=PtxConfig, description="The pretraining mix.")

    @model_validator(mode="after")
    def _minibatches_are_whole(self) -> Self:
        if self.prompts_per_round % self.num_minibatches:
            raise ValueError("prompts_per_round must be a multiple of num_minibatches")
        return self

    @model_validator(mode="after")
    def _kl_coef_can_be_adapted(self) -> Self:
        if self.target_kl is not None and not self.kl_coef:
            raise ValueError("kl_coef must be above 0 where target_kl is set: it is adapted by factors")
        if self.target_kl is not None and self.final_kl_coef is not None:
            raise ValueError("target_kl adapts kl_coef, and final_kl_coef moves it: set one of them")
        return self


class SftConfig(BaseModel):
    """Supervised fine-tuning on demonstrations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_epochs: int = Field(
        4, ge=1, description="Epochs over the demonstrations; the weights of the best epoch are the result."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate; cosine to 10 %.")
    batch_size: int = Field(8, ge=1, description="Demonstrations in one optimizer step.")
    micro_batch_size: int = Field(2, ge=1, description="Demonstrations in one forward pass; gradients are accumulated.")
    max_tokens: int = Field(
        512, ge=2, description="Most tokens of a demonstration with its prompt; longer ones are left out."
    )
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="Share of users whose prompts are used to choose the best epoch."
    )
    min_demonstrations: int = Field(16, ge=1, description="Fewest demonstrations that SFT begins with.")

    @model_validator(mode="after")
    def _batches_are_whole(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError("batch_size must be a multiple of micro_batch_size")
        return self


class TrainingConfig(BaseModel):
    """The training service."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_new_rankings: int = Field(
        192,
        ge=1,
        description="New rankings that start a run. Those count that it would learn from: a user's latest of a sample, "
        "with a comparison, not held out, and of a length that it reads.",
    )
    max_wait_seconds: float | None = Field(
        None,
        gt=0,
        description="A run starts with fewer new rankings once the oldest of them is this old; not set: never.",
    )
    run_every_seconds: float | None = Field(
        None,
        gt=0,
        description="A run starts this long after the last one began, if there is a new ranking; not set: never.",
    )
    poll_seconds: float = Field(1.0, gt=0, description="Seconds between two checks of the store for new rankings.")
    lease_seconds: float = Field(
        60.0, gt=0, description="Seconds after which another trainer may take the place of one that does not answer."
    )
    seed: int = Field(0, ge=0, description="Seed of everything that is drawn at random.")
    promote: bool = Field(True, description="Ask serving to make the new version live once it is registered.")
    min_win_rate: float = Field(
        0.5,
        ge=0,
        le=1,
        description="A version is promoted only if the lower end of the interval of its win rate over the reference "
        "policy, by the reward model, is above this.",
    )
    num_evaluation_prompts: int = Field(
        64, ge=2, description="Most held-out prompts that a new policy is evaluated on."
    )
    completions_per_evaluation_prompt: int = Field(
        4,
        ge=1,
        description="Completions of each evaluation prompt by the new policy, and by the reference policy. Every pair "
        "counts, and best of n is estimated up to this n.",
    )
    num_probes: int = Field(
        4, ge=1, le=64, description="Probes in a version's manifest, by which serving proves that it serves it."
    )
    num_processes: int = Field(
        1, ge=1, description="Processes, one a GPU, that share the models being trained and the rollouts (FSDP)."
    )
    max_num_seqs: int = Field(64, ge=1, description="Most rollouts that the engine draws at once.")
    kv_cache_mib: int = Field(512, ge=16, description="Memory of the rollout engine's KV cache, in MiB.")
    reward_model: RewardModelConfig = Field(default_factory=RewardModelConfig, description="The reward model.")
    ppo: PpoConfig = Field(default_factory=PpoConfig, description="PPO.")
    sft: SftConfig = Field(default_factory=SftConfig, description="Supervised fine-tuning.")

    @model_validator(mode="after")
    def _processes_can_share_evenly(self) -> Self:
        if self.ppo.prompts_per_round % (self.ppo.num_minibatches * self.num_processes):
            raise ValueError(
                f"ppo.prompts_per_round ({self.ppo.prompts_per_round}) must be a multiple of ppo.num_minibatches "
                f"({self.ppo.num_minibatches}) times num_processes ({self.num_processes})"
            )
        return self


# Settings by the names that they had in earlier releases: an old name is refused, and the error gives the new one.
RENAMED = {
    "ppo.num_steps": "ppo.num_rounds",
    "ppo.prompts_per_step": "ppo.prompts_per_round",
    "ppo.num_warmup_steps": "ppo.num_warmup_rounds",
    "ppo.max_judge_drop": "ppo.max_held_out_drop",
    "ppo.checkpoint_every": "ppo.checkpoint_every_rounds",
}
