"""Predicts the memory and the disk that fine-tuning takes, where all of the policy's layers are trained in fp32.

The logits of a micro-batch are there at once, with what TRL computes of them. The reference policy, the reward model
and the engine score each epoch; they stay from start to end.
"""

from __future__ import annotations

from training.config import TrainingConfig
from training.planning.memory import (
    BF16,
    PPO,
    Memory,
    MemoryPart,
    activation_bytes,
    engine_parts,
    last_norm_bytes,
)
from training.planning.model_size import ModelSize
from training.planning.workload import assume

_FP32 = 4
_ADAM = 2 * _FP32
# Numbers in fp32 for each logit of a batch: measured on SmolLM2 with 4 demonstrations of 512 tokens, 6.5 GiB in all.
_LOGITS = 5


def plan_sft_memory(config: TrainingConfig, model: ModelSize, number_bytes: int = BF16) -> Memory:
    """Counts the memory of fine-tuning at its fullest moment, an update on demonstrations as long as is allowed."""
    work = assume(config, model, number_bytes=number_bytes)
    row = config.sft.max_tokens
    tokens = config.sft.micro_batch_size * row
    shorter = "sft.micro_batch_size or sft.max_tokens"
    own = number_bytes * work.reward_layers * model.layer
    activations = activation_bytes(work, model.num_layers, tokens, row, masked=True) + last_norm_bytes(work, tokens)
    cast = BF16 * model.total if number_bytes == BF16 else 0
    return Memory(
        (
            *engine_parts(work),
            MemoryPart("reference", number_bytes * model.total, PPO),
            MemoryPart("reward model: own layers", own, PPO),
            MemoryPart("policy: weights, fp32", _FP32 * model.total, PPO),
            # They are set apart while those that were rounded at random compute (training.sft).
            MemoryPart("policy: exact weights, fp32", 2 * cast, PPO),
            MemoryPart("policy: gradients, fp32", _FP32 * model.total, PPO),
            MemoryPart("policy: Adam's moments, fp32", _ADAM * model.total, PPO),
            MemoryPart("trained weights, cast to bf16", cast, PPO),
            MemoryPart("policy: activations", activations, PPO, shorter),
            MemoryPart("logits", float(_LOGITS * _FP32 * tokens * model.vocabulary), PPO, shorter),
        )
    )


def sft_disk_bytes(model: ModelSize) -> float:
    """Returns what fine-tuning writes at most: two checkpoints, the weights of two epochs, and the version.

    The checkpoint that is replaced goes once the next is whole, and so do the weights of the best epoch so far.
    """
    return 2 * (_FP32 + _ADAM) * model.total + 3 * BF16 * model.total
