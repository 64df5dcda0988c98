"""The prepared models are whole, repeatable, and end what they say with a token that padding is not mistaken for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from deploy.models import MODEL_FILES, ModelError, _make_once, _packaged_gguf, make_tiny_llama, prepare_smollm2


def test_tiny_llama_loads_and_gives_every_token_a_finite_score(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "tiny")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens_BT = torch.tensor([tokenizer.encode("What is the best way to learn to cook?")])
    logits_BTV = model(tokens_BT).logits
    assert model.dtype == torch.bfloat16
    assert logits_BTV.shape == (*tokens_BT.shape, len(tokenizer))
    assert logits_BTV.isfinite().all()


def test_tiny_llama_marks_turns_as_chatml_and_pads_with_another_token_than_it_ends_with(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_tiny_tokenizer_gives_back_any_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path / "tiny"))
    text = "  Käse – 日本語 🧀\n\ttabs and 1,234 digits"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_seed_alone_decides_the_tiny_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (
        load_file(make_tiny_llama(tmp_path / name, seed=seed) / "model.safetensors")
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(first[embedding], other[embedding])
    assert torch.equal(torch.random.get_rng_state(), before), "making a model must not move the caller's random state"


def test_a_prepared_model_is_left_alone(tmp_path: Path) -> None:
    for name in MODEL_FILES:
        (tmp_path / name).write_text("mine")
    assert prepare_smollm2(tmp_path) == tmp_path
    assert {(tmp_path / name).read_text() for name in MODEL_FILES} == {"mine"}


def test_a_folder_with_something_else_in_it_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="is no prepared model"):
        make_tiny_llama(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_preparation_that_was_cut_off_is_begun_anew(tmp_path: Path) -> None:
    partial = tmp_path / ".tiny.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    folder = make_tiny_llama(tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert "model.embed_tokens.weight" in load_file(folder / "model.safetensors")


def test_several_that_want_the_same_model_get_it_once(tmp_path: Path) -> None:
    made = []

    def write(folder: Path) -> None:
        made.append(folder)
        for name in MODEL_FILES:
            (folder / name).write_text("model")
        # Long enough for the others to come by.
        time.sleep(0.2)

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: _make_once(tmp_path / "model", write), range(4)))
    assert folders == {tmp_path / "model"}
    assert len(made) == 1


def test_the_real_model_is_found_without_importing_its_package() -> None:
    gguf = _packaged_gguf()
    assert gguf.read_bytes()[:4] == b"GGUF"
