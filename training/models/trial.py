"""Tries whether the trainer computes a model as the model itself does, before anything is learned with it.

The trainer runs a model's layers itself (training.models.policy). Where an architecture does something that the trainer
leaves out, training would go on with wrong log-probabilities, and nobody would notice. So a few sequences go through
both in fp32: several completions in a row and layers cut in two, as in training, against transformers' own forward pass
over each sequence alone. Only the first layers are loaded, as many as show each kind of layer, and sliding windows are
made shorter than the sequences. So a large model is tried in seconds, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from training.data.groups import Group, pack
from training.errors import TrainingError
from training.models.anatomy import attention_for
from training.models.device import training_device
from training.models.policy import SharedLayers, UpperLayers, completion_logprobs, merged_tensors

SUPPORTED = (
    "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "granite", "llama",
    "mistral", "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip
"""Families, by config.json's model_type, whose tiny models the tests hold against transformers (docs/models.md)."""

_PART_OF_MORE = "it is more than a language model; its text model is only a part of it"
_MOST_NATS = 1e-3
# At least so many layers are tried.
_FEWEST_LAYERS = 4
_WINDOW = 4
_PROMPT_TOKENS, _COMPLETION_TOKENS = (7, 11), (9, 13, 12)
# What a structure that the trainer does not know raises sooner or later.
_RAISED = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


class UnsupportedModelError(TrainingError):
    """The trainer does not compute this model as the model itself does; the message says what to do."""


def check_forward(folder: Path) -> None:
    """Checks that the trainer's log-probabilities of a model are those of the model's own forward pass.

    Raises:
        UnsupportedModelError: they differ, or the trainer cannot run the model or cannot save it whole.
        TrainingError: files of weights lack tensors.
    """
    config: Any = None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        nats = difference(folder, config)
    except _RAISED as error:
        if isinstance(error, TrainingError) or _is_of_memory(error):
            raise
        raise cannot_run(config, error) from error
    if not nats <= _MOST_NATS:
        raise _unsupported(
            config,
            f"the trainer's log-probabilities differ from the model's own by {nats:.2g} nats a token on average, "
            f"where {_MOST_NATS:g} is the most, so it would learn from wrong ones",
        )


def cannot_run(config: Any, error: Exception) -> UnsupportedModelError:
    """Returns what to raise where the trainer's code raised `error` on a model; None as its configuration is unknown.

    Every refusal of an architecture is said here, in the words of docs/models.md.
    """
    said = str(error).partition(". ")[0]
    if config is not None and config.get_text_config() is not config:
        # Whatever failed first, this is why.
        said = _PART_OF_MORE
    elif not isinstance(error, NotImplementedError):
        said = f"{type(error).__name__}: {said}"
    return _unsupported(config, f"the trainer cannot run it ({said})")


def _unsupported(config: Any, why: str) -> UnsupportedModelError:
    names = ", ".join(getattr(config, "architectures", None) or ["its architecture"])
    name = names if config is None else f"{names} ({config.model_type})"
    return UnsupportedModelError(
        f"{name} cannot be trained: {why}. Supported are {', '.join(SUPPORTED)}, and others that pass this check; name "
        "a model of one of these families (docs/models.md)"
    )


def _is_of_memory(error: Exception) -> bool:
    """Whether memory ran out, which says nothing about the model. On a CPU torch has no error of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error)


@torch.no_grad()
def difference(folder: Path, config: Any) -> float:
    """Returns by how much both log-probabilities differ on average, in nats a token. It cuts `config`.

    Raises:
        NotImplementedError: the trainer cannot run the model, or cannot save it whole.
        TrainingError: files of weights lack tensors.
    """
    model = _first_layers(folder, config)
    groups = _groups(config.vocab_size)
    ours = _by_the_trainer(model, groups)
    # The plainest implementation, which knows all that an architecture does to attention.
    model.set_attn_implementation("eager")
    theirs = torch.cat([_by_the_model(model, group.prompt, each) for group in groups for each in group.completions])
    return float((ours - theirs).abs().mean())


def _first_layers(folder: Path, config: Any) -> PreTrainedModel:
    """Loads a model as the trainer does, but in fp32, its first layers alone, and with short windows."""
    _cut(config)
    with _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation=attention_for(config, training_device()),
            local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    model, found = loaded
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise TrainingError(f"{folder}: its files of weights lack {len(missing)} tensors, such as {missing[0]}")
    ready: PreTrainedModel = model.eval().to(training_device())
    return ready


def _cut(config: Any) -> None:
    if config.get_text_config() is not config:
        raise NotImplementedError(_PART_OF_MORE)
    num_layers = config.num_hidden_layers
    kinds = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == num_layers}
    most = max((max(each.index(kind) for kind in each) + 1 for each in kinds.values()), default=1)
    kept = min(num_layers, max(_FEWEST_LAYERS, most))
    config.num_hidden_layers = kept
    for key, value in kinds.items():
        setattr(config, key, value[:kept])
    if getattr(config, "sliding_window", None):
        config.sliding_window = min(config.sliding_window, _WINDOW)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from listing the layers that are left out."""
    level, shows_progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shows_progress:
            transformers_logging.enable_progress_bar()


def _groups(vocabulary: int) -> list[Group]:
    """Makes prompts with several completions, all longer than a window, of tokens from all over the vocabulary."""
    drawn = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(drawn.randrange(vocabulary) for _ in range(count))

    return [Group(tokens(prompt), tuple(tokens(each) for each in _COMPLETION_TOKENS)) for prompt in _PROMPT_TOKENS]


def _by_the_trainer(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    shared = SharedLayers(model)
    packed = pack(groups).to(shared.device)
    level = shared.num_layers // 2
    upper = UpperLayers(model, level, shared.num_layers)
    tied = shared.parts.head_name if model.config.tie_word_embeddings else "-"
    saved = {name for name, _ in merged_tensors(shared, upper, torch.float32)}
    names = {name: shared.parts.saved_name(name) for name in model.state_dict() if not name.startswith(tied)}
    lost = [name for name, saved_name in names.items() if saved_name not in saved]
    if lost:
        raise NotImplementedError(f"it would be saved without {lost[0]}")
    normed_GTD = upper(shared.encode(packed, [level])[level], packed, shared.angles(packed))
    return completion_logprobs(normed_GTD, shared.head, packed)[packed.mask_NC].cpu()


def _by_the_model(model: PreTrainedModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    tokens_T = torch.tensor(prompt + completion, device=model.device)
    logprobs_TV: Tensor = model(input_ids=tokens_T[None], use_cache=False).logits[0].float().log_softmax(-1)
    predicting_CV = logprobs_TV[len(prompt) - 1 : -1]
    return predicting_CV.gather(-1, tokens_T[len(prompt) :, None])[:, 0].cpu()
