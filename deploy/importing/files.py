"""Finds a model's files in its folder: its weights, its settings and its tokenizer; says what of them cannot be used.

Nothing is loaded here but JSON and the headers of weights. Files that are none of the model's are left alone: other
forms of the same weights, files of other programs, copies by a browser, and what macOS writes beside a file.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from deploy.models import ModelError
from policies.weights import INDEX_FILE, WEIGHTS_FILE, WeightsError, read_index, tensor_specs

# What transformers reads of a model, and vLLM through it.
_SETTINGS = ("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
# Of these alone no tokenizer can be made.
_NO_TOKENIZER = {"tokenizer_config.json", "merges.txt"}
_PICKLED_FILE, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# The same weights in another precision, or by the names of another library.
_OTHER_FORM = re.compile(r"consolidated.*|adapter_.*|.*\.(fp16|fp32|bf16|ema|non_ema)(-\d+-of-\d+)?\.safetensors")
_TYPES = frozenset({"BF16", "F16", "F32", "F64"})
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model."""

    folder: Path
    settings: tuple[str, ...]
    """Configuration, tokenizer and chat template."""
    weights: tuple[str, ...]
    pickled: bool
    """Whether the weights have to be unpickled."""


def check_names(names: Collection[str]) -> None:
    """Checks by the names of a model's files that it can be imported.

    Raises:
        ModelError: there are no weights that can be used, or a file that they need is missing.
    """
    if "adapter_config.json" in names:
        raise ModelError("it is an adapter (LoRA); merge it into its base model, and name the folder of the result")
    suffixes = {Path(name).suffix for name in _own(names)}
    # An index whose files are elsewhere is no lack of weights: what it names is said later.
    if ".safetensors" not in suffixes and not {_PICKLED_FILE, _PICKLED_INDEX, INDEX_FILE} & set(names):
        if ".gguf" in suffixes:
            raise ModelError("its weights are GGUF alone; name the safetensors model that they were made from")
        pickled = sorted(name for name in _own(names) if Path(name).suffix in _PICKLES)
        if pickled:
            raise ModelError(
                f"its weights are in a form of their own ({pickled[0]}); save them by transformers' save_pretrained"
            )
        raise ModelError("there are no weights (model.safetensors, or several with model.safetensors.index.json)")
    if "config.json" not in names:
        raise ModelError("there is no config.json")
    if not (set(_TOKENIZERS) - _NO_TOKENIZER) & set(names):
        raise ModelError("there is no tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt)")


def find_files(folder: Path) -> ModelFiles:
    """Returns the files of the model in a folder, whose configuration and files of weights are whole.

    Raises:
        ModelError: something is missing, cut off, or not supported; the message says what.
    """
    try:
        is_file = {path.name: path.is_file() for path in folder.iterdir()}
    except OSError as error:
        raise ModelError(f"the folder cannot be read: {error.strerror}") from error
    names = {name for name in is_file if is_file[name]}
    known = {*_SETTINGS, *_TEMPLATES, *_TOKENIZERS}
    other = sorted(known & is_file.keys() - names)
    if other:
        raise ModelError(f"{other[0]} is no file, but a folder, a pipe or a link to nothing; put the file there")
    check_names(names)
    settings = tuple(sorted(names & known))
    for name in settings:
        if name.endswith(".json"):
            read_json(folder / name)
    _check_config(read_json(folder / "config.json"))
    safetensors = _safetensors(folder, names)
    if safetensors:
        _check_weights(folder, safetensors)
        return ModelFiles(folder, settings, safetensors, pickled=False)
    return ModelFiles(folder, settings, _pickled(folder, names), pickled=True)


def read_json(path: Path) -> dict[str, object]:
    """Returns the JSON object in a file.

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise ModelError(f"{path.name} holds no JSON object")
    return read


def _own(names: Collection[str]) -> set[str]:
    """Returns the names without those of hidden files, such as macOS's ._model.safetensors."""
    return {name for name in names if not name.startswith(".")}


def _check_config(config: dict[str, object]) -> None:
    """Checks that config.json names a model that there can be, and whose weights can be trained.

    Raises:
        ModelError: it does not.
    """
    if not config.get("architectures"):
        raise ModelError("config.json names no architecture (architectures)")
    for name in _SIZES:
        size = config.get(name)
        if isinstance(size, int) and size < 1:
            raise ModelError(f"config.json: {name} is {size}, and must be 1 or more")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(f"its weights are quantised ({method}), and cannot be trained; name the model in bf16 or fp32")


def _safetensors(folder: Path, names: Collection[str]) -> tuple[str, ...]:
    """Returns the model's files of weights; none where it has only pickled ones.

    Those of model.safetensors.index.json go first, then model.safetensors, then the only other file or index.

    Raises:
        ModelError: a file is missing, or nothing says which files are the model's.
    """
    every = {name for name in _own(names) if name.endswith(".safetensors")}
    others = {name for name in every if not _OTHER_FORM.fullmatch(name)} or every
    indices = sorted(name for name in _own(names) if name.endswith(".safetensors.index.json"))
    if INDEX_FILE in names:
        return _named(folder, INDEX_FILE, names)
    if WEIGHTS_FILE in names:
        return (WEIGHTS_FILE,)
    if len(indices) == 1:
        return _named(folder, indices[0], names)
    if len(others) < 2 and not any(map(_SHARD.fullmatch, others)):
        return tuple(others)
    shards = [found for name in sorted(others) if (found := _SHARD.fullmatch(name))]
    sets = {(found["stem"], int(found["count"])) for found in shards}
    if len(shards) < len(others) or len(sets) != 1:
        raise ModelError(
            f"it has several files of weights ({', '.join(sorted(others))}), and nothing says which are the model's: "
            f"leave {WEIGHTS_FILE} alone, or add {INDEX_FILE}"
        )
    stem, count = sets.pop()
    return _present([f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)], names)


def _named(folder: Path, index: str, names: Collection[str]) -> tuple[str, ...]:
    try:
        return _present(sorted(set(read_index(folder / index).values())), names)
    except WeightsError as error:
        raise ModelError(str(error)) from error


def _present(files: list[str], names: Collection[str]) -> tuple[str, ...]:
    missing = [name for name in files if name not in names]
    if missing:
        raise ModelError(
            f"{len(missing)} of its {len(files)} files of weights are missing, such as {missing[0]}; load them again"
        )
    return tuple(files)


def _check_weights(folder: Path, files: tuple[str, ...]) -> None:
    """Checks that files of weights are whole, are what their index says, and can be trained.

    Raises:
        ModelError: they are not.
    """
    tensors = {}
    for name in files:
        try:
            specs = tensor_specs(folder / name)
        except (OSError, WeightsError) as error:
            raise ModelError(f"its weights are cut off or damaged ({error}); load the file again") from error
        for tensor, spec in specs.items():
            if spec.dtype not in _TYPES:
                raise ModelError(
                    f"{name}: tensor {tensor} is of type {spec.dtype}, so cannot be trained; name the model in bf16, "
                    "fp16 or fp32"
                )
        tensors[name] = specs
    if (folder / INDEX_FILE).is_file():
        for tensor, file in read_index(folder / INDEX_FILE).items():
            if tensor not in tensors[file]:
                raise ModelError(f"{file} lacks tensor {tensor}, which {INDEX_FILE} places there; load both again")


def _pickled(folder: Path, names: Collection[str]) -> tuple[str, ...]:
    """Returns the model's pickled files of weights.

    Raises:
        ModelError: a file is missing.
    """
    if _PICKLED_INDEX in names:
        return _named(folder, _PICKLED_INDEX, names)
    return (_PICKLED_FILE,)
