"""Policy versions made for tests: the tiny Llama with other weights, and probes as the trainer computes them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignd.v1 import types_pb2
from alignd.v1.policy_manifest_pb2 import PolicyManifest
from policies.artifact import write_artifact
from policies.precision import compute_dtype
from training.handover.probes import probes_of
from training.models.device import training_device
from training.models.tensor_file import save_model_tensors

Weights = dict[str, torch.Tensor]
PROBE_SEQUENCES = [tuple(range(3, 40)), (1, 50, 60, 70, 2), tuple(range(300, 340))]
EMBEDDINGS = "model.embed_tokens.weight"
LAYER = "model.layers.0.mlp.down_proj.weight"


def perturbed(weights: Weights, seed: int) -> Weights:
    """Returns other weights, except for the embeddings, as the trainer makes them; they write other words."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        if name == EMBEDDINGS
        else (tensor.float() + 0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in weights.items()
    }


def with_nan(weights: Weights) -> Weights:
    """Makes one number NaN."""
    changed = weights[LAYER].clone()
    changed[0, 0] = float("nan")
    return {**weights, LAYER: changed}


def of_another_shape(weights: Weights) -> Weights:
    """Takes a row away from one tensor."""
    return {**weights, LAYER: weights[LAYER][:-1].contiguous()}


def of_another_type(weights: Weights) -> Weights:
    """Makes one tensor fp32."""
    return {**weights, LAYER: weights[LAYER].float()}


def with_one_more(weights: Weights) -> Weights:
    """Adds a tensor that the reference does not have."""
    return {**weights, "model.extra": torch.zeros(4, dtype=torch.bfloat16)}


def with_one_less(weights: Weights) -> Weights:
    """Takes one tensor away."""
    return {name: tensor for name, tensor in weights.items() if name != LAYER}


def with_another_template(folder: Path) -> None:
    """Changes how conversations are rendered."""
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "user"))


def in_shards(folder: Path) -> None:
    """Writes the weights as the trainer does where they are larger than a file may be."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_model_tensors(folder, weights, max_shard_bytes=60_000)


def write_version(
    root: Path,
    model: Path,
    version: int,
    *,
    parent: int = 1,
    reference: int = 1,
    change: Callable[[Weights], Weights] = lambda weights: weights,
    change_manifest: Callable[[PolicyManifest], None] = lambda manifest: None,
    change_files: Callable[[Path], None] = lambda folder: None,
) -> tuple[Path, PolicyManifest]:
    """Writes root/v{version}: the model with perturbed and then changed weights, and probes of the perturbed ones."""
    draft = root.parent / f"draft-{version}"
    shutil.copytree(model, draft, ignore=shutil.ignore_patterns("manifest.json"))
    weights = perturbed(load_file(model / "model.safetensors"), seed=version)
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    manifest = PolicyManifest(version=version, parent_version=parent, reference_version=reference, code_version="test")
    manifest.create_time.GetCurrentTime()
    manifest.probes.extend(probes_of(draft, PROBE_SEQUENCES, len(PROBE_SEQUENCES)))
    manifest.training.run_id = "by-hand"
    change_manifest(manifest)
    save_file(change(weights), draft / "model.safetensors", metadata={"format": "pt"})
    change_files(draft)
    written = write_artifact(root, manifest, lambda folder: copy_files(draft, folder))
    shutil.rmtree(draft)
    return written


def copy_files(source: Path, target: Path) -> None:
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)


def greedy_text(folder: Path, token_ids: list[int], tokenizer: Any, num_tokens: int) -> str:
    """Returns what transformers writes with the weights in the folder, in a server's default precision here."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype(training_device()))
    written = model.generate(torch.tensor([token_ids]), max_new_tokens=num_tokens, do_sample=False)
    # A server holds back bytes at the end that make no character yet; transformers decodes them as U+FFFD.
    return str(tokenizer.decode(written[0, len(token_ids) :], skip_special_tokens=True)).rstrip("\ufffd")


def names(completion: types_pb2.Completion) -> tuple[int, str]:
    """Returns the version and weights that the completion says wrote it."""
    return completion.policy.version, completion.policy.weight_digest
