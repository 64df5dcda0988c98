"""Ordinary folders of models, as people have them, and what is wrong with others: made from a whole one."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Change = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors")
FORMAT = {"format": "pt"}


def with_config(**values: object) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def renamed(old: str, new: str) -> Change:
    return lambda folder: (folder / old).rename(folder / new)


def beside(name: str, content: str = "{}") -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return change


def in_order(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def in_shards(dtype: torch.dtype = torch.bfloat16) -> Change:
    """Saves the model as transformers does where it is larger than a file may be."""

    def change(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        (folder / WEIGHTS).unlink()
        model.save_pretrained(folder, max_shard_size="60KB")

    return change


def in_precision(dtype: torch.dtype) -> Change:
    return changed_weights(lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()})


def changed_weights(
    change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]], name: str = WEIGHTS
) -> Change:
    def write(folder: Path) -> None:
        weights = {key: tensor.contiguous().clone() for key, tensor in change(load_file(folder / WEIGHTS)).items()}
        save_file(weights, folder / name, FORMAT)

    return write


def with_head(weights: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def as_mistrals(weights: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def pickled(*, shards: bool = False) -> Change:
    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        if not shards:
            torch.save(weights, folder / "pytorch_model.bin")
            return
        named = dict.fromkeys(weights, "pytorch_model-00001-of-00002.bin")
        named["model.norm.weight"] = "pytorch_model-00002-of-00002.bin"
        for file in set(named.values()):
            torch.save({key: weights[key] for key in weights if named[key] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))

    return change


def truncated(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def padded_vocabulary(folder: Path) -> None:
    """Gives the embedding more rows than the tokenizer has tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.resize_token_embeddings(model.config.vocab_size + 64)
    model.save_pretrained(folder)


def linked(folder: Path) -> None:
    """Makes each file a link to a blob, as in the cache of Hugging Face's hub."""
    blobs = folder.parent / f"{folder.name}-blobs"
    folder.rename(blobs)
    folder.mkdir()
    for number, blob in enumerate(sorted(blobs.iterdir())):
        blob.rename(blobs / str(number))
        (folder / blob.name).symlink_to(Path("..") / blobs.name / str(number))


def read_only(folder: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)


def template_for_processors(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()


def template_in_tokenizer_config(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    (folder / "chat_template.jinja").unlink()


def with_extra_token(folder: Path) -> None:
    """Adds a token to the tokenizer that the model has no embedding for."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    added = {"id": size, "content": "<|extra_99|>", "special": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def copied(model: Path, target: Path, change: Change) -> Path:
    """Returns a changed copy of a model."""
    shutil.copytree(model, target)
    change(target)
    return target


def swap_shards(folder: Path) -> None:
    """Puts one shard in the place of another."""
    shutil.copyfile(folder / SHARDS[0], folder / SHARDS[1])


def without_end_token(folder: Path) -> None:
    """Takes the end token from each file that names it, and the template that closes turns with it."""
    for name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        config = json.loads((folder / name).read_text())
        del config[key]
        (folder / name).write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    (folder / "chat_template.jinja").unlink()


class _Code:
    """Writes a file beside the model's folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.folder.parent / "was here",)


def pickled_code(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"model.norm.weight": _Code(folder)}, folder / "pytorch_model.bin")
