"""Work that is long on a large model, or with much data, shows progress in each of its parts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from alignd.v1 import types_pb2
from feedback.store.stored import StoredPrompt
from policies.artifact import write_artifact
from policies.manifest import new_manifest
from training.config import LoraConfig
from training.data.dataset import make_dataset
from training.models.policy import SharedLayers, load_model, merged_weights, save_weights, upper_layers_of
from training.models.tensor_file import load_weights
from training.ppo.ptx import sequences
from training.runs.checkpoint import newest_checkpoint, save_checkpoint


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    found: list[None] = []
    monkeypatch.setattr("feedback.heartbeat.beat", lambda: found.append(None))
    return found


def load(model: Path, folder: Path) -> object:
    return load_model(model)


def make_policy(model: Path, folder: Path) -> object:
    shared = SharedLayers(load_model(model))
    return merged_weights(shared, upper_layers_of(model, shared, 1, LoraConfig()))


def save_and_resume(model: Path, folder: Path) -> object:
    save_checkpoint(folder, 1, load_weights(model), {})
    return newest_checkpoint(folder)


def tokenize_prompts(model: Path, folder: Path) -> object:
    asked = [StoredPrompt(f"s{n}", f"u{n}", types_pb2.Prompt(text=f"Why {n}?")) for n in range(20)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    limits = {"max_prompt_tokens": 64, "max_group_tokens": 64}
    return make_dataset(tokenizer, [], asked, held_out_share=0.5, **limits)


def read_pretraining_text(model: Path, folder: Path) -> object:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return list(sequences(iter(["a text"] * 20), tokenizer, 8))


@pytest.mark.parametrize("work", [load, make_policy, save_and_resume, tokenize_prompts, read_pretraining_text])
def test_each_part_of_long_work_shows_progress(
    work: Callable[[Path, Path], object], tiny_folder: Path, tmp_path: Path, beats: list[None]
) -> None:
    work(tiny_folder, tmp_path)
    assert len(beats) >= 20


def test_a_version_that_is_written_shows_each_of_its_files(
    tiny_folder: Path, tmp_path: Path, beats: list[None]
) -> None:
    weights, done = load_weights(tiny_folder), [0]
    beats.clear()
    _, manifest = write_artifact(
        tmp_path,
        new_manifest(1, reference_version=1),
        lambda draft: save_weights(draft, weights, tiny_folder, max_shard_bytes=1 << 12),
        lambda: done.append(len(done)),
    )
    assert done[-1] == len(manifest.files)
    assert len(beats) >= len(weights)
