"""Supervised fine-tuning on demonstrations, with TRL's SFTTrainer: makes the policy that PPO starts from.

As in InstructGPT, appendix C.1: the loss counts the demonstrated completions alone, the learning rate falls to 10 %
along a cosine, and the result is the epoch whose completions of validation prompts have the highest score by the reward
model. Validation loss would overfit long before that epoch.

TRL's trainer writes a checkpoint after each epoch. Its pickled parts are read back as tensors and numbers alone.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer

from policies.precision import compute_dtype
from training.config import SftConfig
from training.data.demonstrations import Demonstration
from training.errors import TrainingError
from training.models.anatomy import attention_of
from training.models.device import training_device
from training.models.masters import noise_source, rounded
from training.models.tensor_file import save_tensors

SCORE = "score"
_STATE, _WEIGHTS = "trainer_state.json", "epoch-{}.safetensors"


@dataclass(frozen=True)
class Epoch:
    """The figures of one epoch."""

    index: int
    loss: float
    score: float
    """Mean score, by the reward model, of completions of the validation prompts."""


Scorer = Callable[[dict[str, Tensor]], float]
"""Returns the mean score of the answers of a policy of these weights to the validation prompts."""


def fine_tune(
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    score_of: Scorer,
    config: SftConfig,
    scratch: Path,
    *,
    seed: int,
    log: Callable[[Epoch], None],
) -> tuple[dict[str, Tensor], list[Epoch]]:
    """Returns the weights of the epoch with the highest score, in bf16 by the checkpoint's names, and all epochs.

    Resumes after the last epoch that is whole in `scratch`. On a CPU the result is bit for bit what it would have been
    without the kill.

    Raises:
        TrainingError: there are too few demonstrations, or no epoch had a finite loss.
    """
    short = [each for each in demonstrations if len(each.prompt) + len(each.completion) <= config.max_tokens]
    if len(short) < config.min_demonstrations:
        raise TrainingError(
            f"SFT: {len(short)} demonstrations of at most {config.max_tokens} tokens, "
            f"fewer than sft.min_demonstrations = {config.min_demonstrations}"
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation=attention_of(model_folder), local_files_only=True,
        use_safetensors=True,
    )  # fmt: skip
    in_bf16 = compute_dtype(training_device()) is torch.bfloat16
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config, scratch, seed),
        train_dataset=_rows(short, seed),
        processing_class=tokenizer,
        callbacks=[_Scored(score_of, log, scratch, seed), *([_StochasticRounding(seed)] if in_bf16 else [])],
    )
    trainer.train(resume_from_checkpoint=_newest_checkpoint(scratch))
    epochs = _epochs(trainer.state)
    best = best_of(epochs)
    if best is None:
        raise TrainingError("SFT: no epoch had a finite loss")
    return load_file(_weights_file(scratch, best)), epochs


def best_of(epochs: Iterable[Epoch]) -> Epoch | None:
    """Returns the first epoch with the greatest score, among those with a finite loss; None if there is none."""
    return max((epoch for epoch in epochs if math.isfinite(epoch.loss)), key=lambda epoch: epoch.score, default=None)


def _rows(demonstrations: Sequence[Demonstration], seed: int) -> Dataset:
    shuffled = random.Random(seed).sample(list(demonstrations), len(demonstrations))
    return Dataset.from_dict(
        {
            "input_ids": [[*each.prompt, *each.completion] for each in shuffled],
            "completion_mask": [[0] * len(each.prompt) + [1] * len(each.completion) for each in shuffled],
        }
    )


def _arguments(config: SftConfig, scratch: Path, seed: int) -> TrlConfig:
    arguments = TrlConfig(
        output_dir=str(scratch),
        num_train_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        completion_only_loss=True,
        max_length=config.max_tokens,
        adam_beta2=0.95,
        bf16=compute_dtype(training_device()) is torch.bfloat16,
        gradient_checkpointing=False,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="epoch",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
    )
    # Where there are several GPUs it would use all of them by DataParallel, which TRL refuses.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


class _StochasticRounding(TrainerCallback):
    """Has each step's passes compute with weights that were rounded to bf16 at random (training.models.masters).

    TRL's trainer knows one kind of weights. So these are the rounded ones while it computes, and in fp32 otherwise.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.exact: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Rounds the weights, before the forward pass."""
        noise = noise_source(model.device, self.seed + state.global_step)
        for name, weight in model.named_parameters():
            self.exact[name] = weight.clone()
            weight.copy_(rounded(weight, noise))

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Puts the exact weights back, after the backward pass."""
        for name, weight in model.named_parameters():
            weight.copy_(self.exact.pop(name))


class _Scored(TrainerCallback):
    """Scores each epoch when it ends, and keeps the weights of the best one in `scratch`.

    The score goes into the trainer's own log, which is part of its checkpoints.
    """

    def __init__(self, score_of: Scorer, log: Callable[[Epoch], None], scratch: Path, seed: int) -> None:
        self.score_of, self.log_epoch, self.scratch, self.seed = score_of, log, scratch, seed

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Scores the epoch: called with its mean loss, once at its end, before its checkpoint is written."""
        if "loss" not in (logs or {}):
            return
        weights = _checkpoint_weights(model, self.seed)
        state.log_history[-1][SCORE] = self.score_of(weights)
        *_, epoch = epochs = _epochs(state)
        if epoch is best_of(epochs):
            save_tensors(_weights_file(self.scratch, epoch), weights, {})
        self.log_epoch(epoch)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Removes the weights of all epochs except the best, once the checkpoint after them is written."""
        best = best_of(_epochs(state))
        for path in self.scratch.glob(_WEIGHTS.format("*")):
            if best is None or path != _weights_file(self.scratch, best):
                path.unlink()


def _epochs(state: TrainerState) -> list[Epoch]:
    scored = [each for each in state.log_history if SCORE in each]
    return [Epoch(index, float(each["loss"]), float(each[SCORE])) for index, each in enumerate(scored)]


def _weights_file(scratch: Path, epoch: Epoch) -> Path:
    return scratch / _WEIGHTS.format(epoch.index)


def _newest_checkpoint(scratch: Path) -> str | None:
    """Returns the checkpoint to resume from; None if there is none."""
    whole = [path.parent for path in scratch.glob(f"checkpoint-*/{_STATE}") if _is_whole(path)]
    newest = max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


def _is_whole(state: Path) -> bool:
    """Whether this file, the last one of a checkpoint that the trainer writes, is complete."""
    try:
        json.loads(state.read_text())
    except json.JSONDecodeError:
        return False
    return True


def _checkpoint_weights(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Copies the model's weights in bf16, rounded at random, by the names that they have in its checkpoint."""
    noise = noise_source(model.device, seed)
    weights = {name: rounded(tensor.detach(), noise).cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights
