"""Runs and times TRL's PPOTrainer on the CPU, for bench.peers.environment to call with a Python that has TRL 1.12.

    python -I ppo_trl.py JOB UPDATES

JOB is a JSON file with exactly the fields of `Job`. To UPDATES one JSON object is written a line, when an update ends:

    update         its number, from 1
    seconds        from the end of the one before, or from the start of training: rollouts, scoring, all epochs
    score          mean of the reward model's score over the episodes
    kl             mean over the episodes of log π - log π_ref summed over their tokens, TRL's objective/kl
    ended          episodes that ended before the token limit
    peak_rss_mib   most memory that this process had resident until then

Policy, reference, reward and value model are four models made of the same weights. The score is linear in the hidden
state after the last norm, at the last real token; the value model starts as the reward model. Of policy and value model
all layers are trained, and no embeddings, as in alignd.
What this script sets besides the job is what is fastest on a CPU: no gradient checkpointing, no key-value cache in
passes that generate nothing, one batch for scoring, one micro-batch in a mini-batch, frozen models in the job's
precision. Weights that are trained stay in float32, and so do rollouts, which read them: in bfloat16 an update is a
sixth cheaper, but at a learning rate of 1e-5 only one weight in fifty moves at all. Where the job is in bf16, the KL of
equal weights is therefore not quite 0. The rate is constant. TRL clips no gradients, clips values to ± 0.2, and has
AdamW without weight decay.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What to run. All episodes of an update are drawn together and learned from in `num_ppo_epochs` passes."""

    model: str
    """Folder of a causal language model and its tokenizer, whose end and padding tokens differ."""
    score_head: str
    """Safetensors file with score.weight, [1, hidden size]."""
    prompts: list[list[int]]
    """Token ids, unpadded and without the padding token. Each is used once before any is used again, in random order;
    at least `batch` of them."""
    num_updates: int
    batch: int
    """Episodes in an update."""
    response_tokens: int
    num_ppo_epochs: int
    num_mini_batches: int
    """Optimizer steps in an epoch."""
    learning_rate: float
    adam_beta2: float
    adam_eps: float
    kl_coef: float
    cliprange: float
    vf_coef: float
    gamma: float
    lam: float
    missing_eos_penalty: float | None
    temperature: float
    precision: str
    """fp32, or bf16: that of the frozen models, and autocast in the passes that learn; trained weights and rollouts
    are float32 all the same."""
    seed: int
    threads: int


class _Stopwatch(TrainerCallback):
    """Writes a line when an update ends."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.began_at = 0.0
        self.logs: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began_at = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs = logs

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended_at = time.perf_counter()
        update = {
            "update": state.global_step,
            "seconds": ended_at - self.began_at,
            "score": self.logs["objective/scores"],
            "kl": self.logs["objective/kl"],
            "ended": self.logs["val/num_eos_tokens"],
            "peak_rss_mib": peak_rss_mib(),
        }
        print(json.dumps(update), file=self.file, flush=True)
        self.began_at = ended_at


def peak_rss_mib() -> float:
    """Returns the most memory that this process had resident. getrusage would include the process it forked from."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Runs the job named by the first argument, and writes to the second."""
    job_path, updates_path = map(Path, sys.argv[1:])
    job = Job(**json.loads(job_path.read_text()))
    torch.set_num_threads(job.threads)
    with updates_path.open("w") as file, tempfile.TemporaryDirectory() as folder:
        _make_trainer(job, folder, _Stopwatch(file)).train()


def _make_trainer(job: Job, folder: str, stopwatch: _Stopwatch) -> PPOTrainer:
    """Loads the four models and puts them into a trainer."""
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    if len(job.prompts) < job.batch or any(tokenizer.pad_token_id in prompt for prompt in job.prompts):
        # TRL waits for ever for a whole batch, and takes every padding token for padding.
        raise ValueError(f"need at least {job.batch} prompts, none with the padding token {tokenizer.pad_token}")
    if job.precision not in _PRECISIONS:
        raise ValueError(f"precision is fp32 or bf16, not {job.precision}")
    frozen = _PRECISIONS[job.precision]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype) for dtype in (torch.float32, frozen)
    )
    value_model, reward_model = (_score_model(job, dtype) for dtype in (torch.float32, frozen))
    for model in (policy, reference, reward_model, value_model):
        model.config.use_cache = False
        model.get_input_embeddings().requires_grad_(False)
    return PPOTrainer(
        args=_ppo_config(job, folder),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=[{"input_ids": prompt} for prompt in job.prompts],
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[stopwatch],
    )


def _score_model(job: Job, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model with the score's head."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, dtype=dtype)
    model.get_submodule("score").load_state_dict({"weight": load_file(job.score_head)["score.weight"]})
    return model


def _ppo_config(job: Job, folder: str) -> PPOConfig:
    """Returns the job as TRL's settings, with those that differ from TRL's defaults."""
    if job.precision == "bf16":
        # The trainer's own bf16=True no longer reaches its Accelerator; this variable does.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    return PPOConfig(
        output_dir=folder,
        total_episodes=job.num_updates * job.batch,
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=job.batch,
        num_mini_batches=job.num_mini_batches,
        num_ppo_epochs=job.num_ppo_epochs,
        response_length=job.response_tokens,
        stop_token="eos",
        temperature=job.temperature,
        missing_eos_penalty=job.missing_eos_penalty,
        learning_rate=job.learning_rate,
        adam_beta2=job.adam_beta2,
        adam_epsilon=job.adam_eps,
        lr_scheduler_type="constant",
        kl_coef=job.kl_coef,
        cliprange=job.cliprange,
        vf_coef=job.vf_coef,
        gamma=job.gamma,
        lam=job.lam,
        seed=job.seed,
        bf16=job.precision == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
