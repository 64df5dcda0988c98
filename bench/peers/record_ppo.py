"""Records what enters and leaves TRL 1.12's PPOTrainer in one update of tiny models, for tests that ours does the same.

    python -m bench.peers.environment
    var/bench/venv-trl-1.12/bin/python -I bench/peers/record_ppo.py \
        tests/training/ppo/recordings/trl_1_12_ppo.safetensors

TRL's code runs as it is. Three functions that its `train` calls are wrapped, and copy the local variables of its frame
before they do what they did: `masked_whiten`, once the batch is complete, `backward`, in each optimizer step, and
`log`, at the end. No arithmetic of TRL's is repeated here. The recording is a safetensors file with

    policy/, reference/, reward/, value/       the models' weights before the update, by name
    batch/                                     the update's variables, by TRL's names, rows in order; `whitened` is
                                               `advantages` after whitening
    steps/                                     each optimizer step's variables, with a first axis of steps
    gradients/policy/, gradients/value/        what `backward` left, likewise
    after/policy/, after/value/                the trained weights after the update
    metadata                                   JSON: job, sizes of the models, what TRL logged, and versions

The models share token embeddings and output embedding; these and the value model's norm are frozen, as alignd has them.
Nothing stands at a value that would hide it: policy and reference differ, as do score and value, both clip ranges are
different, nothing is 1 but the temperature. The rate is so large that ratios and values are clipped in later steps.
"""

import copy
import json
import sys
import tempfile
from types import FrameType
from typing import Any

import numpy as np
import torch
import transformers
import trl
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

_PAD, _EOS = 0, 1
_SIZES: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32, "initializer_range": 0.3,
    "tie_word_embeddings": False, "pad_token_id": _PAD, "eos_token_id": _EOS, "bos_token_id": None,
}  # fmt: skip
_PROMPTS = [[5, 9], [7, 3, 20, 11], [2, 2, 13], [17], [4, 19, 8, 6, 21, 10], [12, 15, 3], [23, 14], [18, 6, 16, 22, 9]]
_JOB: dict[str, Any] = {
    "response_length": 8, "num_ppo_epochs": 2, "num_mini_batches": 2, "learning_rate": 6e-3, "kl_coef": 0.3,
    "missing_eos_penalty": 0.7, "cliprange": 0.2, "cliprange_value": 0.15, "vf_coef": 0.4, "gamma": 0.97, "lam": 0.9,
    "temperature": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "seed": 24,
}  # fmt: skip
_OF_BATCH = (
    "queries", "responses", "logprobs", "ref_logprobs", "scores", "values", "rewards", "advantages", "returns",
    "padding_mask", "padding_mask_p1",
)  # fmt: skip
_OF_STEP = ("micro_batch_inds", "new_logprobs", "vpred", "loss")
_OF_STEPS = ("pg_loss_stats", "vf_loss_stats", "pg_clipfrac_stats", "vf_clipfrac_stats", "approxkl_stats")
_TRAINED = ("policy", "value")

_Recording = dict[str, Tensor]


def main() -> None:
    """Records into the file named by the argument."""
    torch.set_num_threads(1)
    transformers.set_seed(_JOB["seed"])
    models = _make_models()
    recording = {f"{name}/{key}": _copied(each) for name, model in models.items() for key, each in _weights(model)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trainer(models, folder)
        steps, logged = _watch(trainer, models, recording)
        trainer.train()
    for name in steps[0]:
        recording[name] = torch.stack([step[name] for step in steps])
    for name in _TRAINED:
        recording |= {f"after/{name}/{key}": _copied(each) for key, each in _trained(models[name])}
    _check(recording)
    about = {"job": _JOB, "sizes": _SIZES, "logged": logged, "trl": trl.__version__, "torch": torch.__version__}
    # One value, since safetensors keeps no order of several: the same run writes the same file.
    save_file(recording, sys.argv[1], {"recording": json.dumps(about)})


def _make_models() -> dict[str, Any]:
    """Returns four models that differ in everything except the embeddings; what is not to be trained is frozen."""
    reference = LlamaForCausalLM(LlamaConfig(**_SIZES))
    policy = copy.deepcopy(reference)
    models: dict[str, Any] = {"policy": policy, "reference": reference}
    for name in ("reward", "value"):
        models[name] = LlamaForSequenceClassification(LlamaConfig(**{**_SIZES, "num_labels": 1}))
        models[name].model.load_state_dict(reference.model.state_dict())
    for model in models.values():
        model.config.use_cache = False
        for part in (model.model.layers, model.model.norm):
            for parameter in part.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.model.embed_tokens.requires_grad_(False)
    policy.lm_head.requires_grad_(False)
    models["value"].model.norm.requires_grad_(False)
    return models


def _make_trainer(models: dict[str, Any], folder: str) -> PPOTrainer:
    """Returns TRL's trainer for one update on the CPU in float32."""
    vocabulary = {f"t{token}": token for token in range(_SIZES["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, f"t{_PAD}")),
        pad_token=f"t{_PAD}", eos_token=f"t{_EOS}", padding_side="left",
    )  # fmt: skip
    config = PPOConfig(
        **_JOB,
        output_dir=folder, total_episodes=len(_PROMPTS), per_device_train_batch_size=len(_PROMPTS),
        gradient_accumulation_steps=1, local_rollout_forward_batch_size=len(_PROMPTS), stop_token="eos",
        kl_estimator="k1", whiten_rewards=False, lr_scheduler_type="constant", weight_decay=0.0, bf16=False,
        use_cpu=True, gradient_checkpointing=False, num_sample_generations=0, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=models["policy"],
        ref_model=models["reference"],
        reward_model=models["reward"],
        value_model=models["value"],
        train_dataset=[{"input_ids": prompt} for prompt in _PROMPTS],
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def _watch(
    trainer: PPOTrainer, models: dict[str, Any], recording: _Recording
) -> tuple[list[_Recording], dict[str, float]]:
    """Makes a run write into `recording`. Returns what it will fill: variables of each step, and what was logged."""
    steps: list[_Recording] = []
    logged: dict[str, float] = {}
    whiten, backward, log = ppo_trainer.masked_whiten, trainer.accelerator.backward, trainer.log

    def watched_whiten(*arguments: Any, **named: Any) -> Any:
        recording.update(_seen(sys._getframe(1), "batch", _OF_BATCH))
        return whiten(*arguments, **named)

    def watched_backward(*arguments: Any, **named: Any) -> None:
        step = _seen(sys._getframe(1), "steps", _OF_STEP)
        backward(*arguments, **named)
        for name in _TRAINED:
            step |= {f"gradients/{name}/{key}": _copied(each.grad) for key, each in _trained(models[name])}
        steps.append(step)

    def watched_log(metrics: dict[str, float], *arguments: Any, **named: Any) -> None:
        frame = sys._getframe(1)
        recording["batch/whitened"] = _copied(frame.f_locals["advantages"])
        recording.update({name: each.flatten() for name, each in _seen(frame, "steps", _OF_STEPS).items()})
        # eps is a speed.
        logged.update({name: value for name, value in metrics.items() if name != "eps"})
        log(metrics, *arguments, **named)

    ppo_trainer.masked_whiten = watched_whiten
    trainer.accelerator.backward, trainer.log = watched_backward, watched_log
    return steps, logged


def _seen(frame: FrameType, prefix: str, names: tuple[str, ...]) -> _Recording:
    """Returns copies of a frame's local variables."""
    return {f"{prefix}/{name}": _copied(frame.f_locals[name]) for name in names}


def _copied(values: Tensor | np.ndarray[Any, Any] | None) -> Tensor:
    """Returns a copy, which later changes do not reach."""
    return torch.as_tensor(values).detach().clone()


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns all weights of the model, by name."""
    return sorted(model.state_dict().items())


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters that take gradients."""
    return [(name, each) for name, each in model.named_parameters() if each.requires_grad]


def _check(recording: _Recording) -> None:
    """Checks that the batch has every case that matters; the seed decides.

    Raises:
        ValueError: a case is missing, or a padding token was drawn.
    """
    responses_NC = recording["batch/responses"]
    ends_NC = responses_NC == _EOS
    ended_N, at_limit_N = ends_NC.any(1), ends_NC[:, -1]
    # TRL takes a padding token that was drawn for the end.
    drawn_pad = ((responses_NC == _PAD) & (ends_NC.cumsum(1) == 0)).any()
    clips = [recording[f"steps/{name}"].count_nonzero() for name in ("pg_clipfrac_stats", "vf_clipfrac_stats")]
    early, open_ended = (ended_N & ~at_limit_N).sum(), (~ended_N).sum()
    if drawn_pad or min(early, open_ended) < 2 or not at_limit_N.any() or min(clips) < 2:
        raise ValueError("need responses that end early, at the limit and not at all, without a pad drawn, and clips")


if __name__ == "__main__":
    main()
