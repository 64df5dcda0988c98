"""Computes the work of a configuration: which layers run and which are trained, and how many tokens they process.

Mean lengths depend on the data, and are assumed if they are not given: prompts of a quarter of `max_prompt_tokens`, and
rollouts of three quarters of `max_tokens`. Rows are assumed to have no padding. Names: see training.data.groups and
training.planning.model_size.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.config import TrainingConfig
from training.models.attention import in_parts
from training.models.device import training_device
from training.planning.model_size import ModelSize

_PROMPT_SHARE = 0.25
_COMPLETION_SHARE = 0.75


@dataclass(frozen=True)
class Workload:
    """A configuration, a model, and the mean lengths of prompts and rollouts, in tokens."""

    config: TrainingConfig
    model: ModelSize
    prompt_tokens: float
    completion_tokens: float
    number_bytes: int
    """Bytes of a number in the precision that the device computes in: 2 or 4 (policies.precision)."""

    @property
    def frozen_layers(self) -> int:
        """Layers below the policy's own; at least one layer is trained, as in training.phases.policy."""
        return min(self.config.ppo.num_frozen_layers, self.model.num_layers - 1)

    @property
    def policy_layers(self) -> int:
        """Layers of the policy that are trained, whole or by adapters."""
        return self.model.num_layers - self.frozen_layers

    @property
    def reward_level(self) -> int:
        """The layer whose output the reward model's heads read."""
        return min(self.config.reward_model.num_layers, self.model.num_layers)

    @property
    def reward_layers(self) -> int:
        """The reward model's own layers, of which the value model has copies."""
        return min(self.config.reward_model.num_trained_layers, self.reward_level)

    @property
    def shared_layers(self) -> int:
        """Lower layers that run once for all models."""
        return max(self.frozen_layers, self.reward_level)

    @property
    def upper_parameters(self) -> int:
        """Parameters of the policy's own layers and final norm."""
        return self.policy_layers * self.model.layer + self.model.norm

    @property
    def lora_parameters(self) -> int:
        """Parameters of the adapters; 0 where full weights are trained."""
        return self.config.ppo.lora.rank * self.policy_layers * self.model.linear_widths

    @property
    def policy_parameters(self) -> int:
        """Parameters of the policy that take gradients."""
        return self.lora_parameters or self.upper_parameters

    @property
    def copied_bytes(self) -> int:
        """Bytes of a number of the copies that trained weights are cast to once a step; 0 where there are none."""
        if self.number_bytes == 4 or not self.config.ppo.stochastic_rounding:
            return 0
        # Divided by FSDP they are kept as wide as gradients must be.
        return 4 if self.config.num_processes > 1 else self.number_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache for one token."""
        return self.number_bytes * self.model.cache_width

    @property
    def features(self) -> int:
        """Width of what a head reads: the last hidden state and the mean of all."""
        return 2 * self.model.hidden

    @property
    def value_parameters(self) -> int:
        """Parameters of the value model, all of which take gradients."""
        return self.reward_layers * self.model.layer + self.features

    @property
    def reward_parameters(self) -> int:
        """Parameters of the reward model's own layers and its heads."""
        return self.reward_layers * self.model.layer + self.features * self.config.reward_model.num_heads

    @property
    def trained_parameters(self) -> int:
        """Parameters that PPO's optimizer updates."""
        return self.policy_parameters + self.value_parameters

    @property
    def learned_rankings(self) -> int:
        """The most rankings that the reward model learns from; the others only measure."""
        return round(self.config.reward_model.max_rankings * (1 - self.config.reward_model.held_out_share))

    @property
    def rollouts(self) -> int:
        """Rollouts of one round."""
        return self.config.ppo.prompts_per_round * self.config.ppo.rollouts_per_prompt

    @property
    def row_tokens(self) -> float:
        """Tokens of a prompt with its rollouts: p + K c."""
        return self.prompt_tokens + self.config.ppo.rollouts_per_prompt * self.completion_tokens

    @property
    def masked(self) -> bool:
        """Whether attention takes a mask of all pairs of a row, and is not in parts."""
        return not in_parts(training_device())

    @property
    def context(self) -> float:
        """Tokens to which attention computes the logits of a row's token, on average."""
        if self.masked:
            return self.row_tokens
        prompt, each, count = self.prompt_tokens, self.completion_tokens, self.config.ppo.rollouts_per_prompt
        return (prompt**2 + count * each * (prompt + each)) / self.row_tokens

    @property
    def longest_row(self) -> int:
        """Tokens of a prompt with its rollouts, at the greatest lengths that the configuration allows."""
        ppo = self.config.ppo
        return ppo.max_prompt_tokens + ppo.rollouts_per_prompt * ppo.max_tokens

    @property
    def round_tokens(self) -> float:
        """Tokens of a round's rows."""
        return self.config.ppo.prompts_per_round * self.row_tokens

    @property
    def predicted_tokens(self) -> float:
        """Tokens of a round's rollouts; only these need logits."""
        return self.rollouts * self.completion_tokens

    @property
    def kept_share(self) -> float:
        """Share of a round whose pass is not repeated: that of the first optimizer step, if it is one micro-batch."""
        ppo = self.config.ppo
        of_a_step = self.round_tokens / ppo.num_minibatches / self.config.num_processes
        kept = of_a_step <= ppo.micro_batch_tokens and not ppo.gradient_checkpointing
        return 1 / ppo.num_minibatches if kept else 0.0

    @property
    def pretraining_tokens(self) -> float:
        """Tokens of pretraining text in a round; 0 for plain PPO."""
        mix = self.config.ppo.ptx
        return round(mix.examples_per_episode * self.rollouts) * mix.sequence_tokens if mix.data else 0


def assume(
    config: TrainingConfig,
    model: ModelSize,
    prompt_tokens: float | None = None,
    completion_tokens: float | None = None,
    number_bytes: int = 2,
) -> Workload:
    """Returns the workload, with assumed mean lengths where none are given."""
    return Workload(
        config=config,
        model=model,
        prompt_tokens=prompt_tokens or _PROMPT_SHARE * config.ppo.max_prompt_tokens,
        completion_tokens=completion_tokens or _COMPLETION_SHARE * config.ppo.max_tokens,
        number_bytes=number_bytes,
    )
