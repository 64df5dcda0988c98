"""Parameters are those that the files have, and FLOPs those that torch counts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from tests.training.planning.model_configs import MISTRAL, QWEN, SMOLLM2, size_of
from training.data.groups import Group, pack
from training.models.policy import SharedLayers, UpperLayers, completion_logprobs
from training.planning.model_size import UnknownModelError, read_model

GROUPS = [Group((1, 5, 9, 300), ((7, 8, 2), (11, 12))), Group((1, 40, 41, 42), ((200, 201), (204, 205, 2)))]


def test_parameters_of_the_tiny_model_are_those_in_its_file(tiny_folder: Path) -> None:
    model, tensors = read_model(tiny_folder), load_file(tiny_folder / "model.safetensors")
    assert model.total == sum(tensor.numel() for tensor in tensors.values())
    assert model.layer == sum(tensor.numel() for name, tensor in tensors.items() if ".layers.1." in name)
    assert model.embedding == tensors["model.embed_tokens.weight"].numel()
    assert model.head == 0


# The totals are those of the model cards. Qwen's attention has biases; Mistral has a separate output embedding.
@pytest.mark.parametrize(
    ("name", "total"), [(SMOLLM2, 134_515_008), (QWEN, 1_543_714_304), (MISTRAL, 7_248_023_552)], ids=str
)
def test_parameters_of_real_models(name: str, total: int) -> None:
    assert size_of(name).total == total


def test_an_output_embedding_of_its_own_counts_and_the_token_embedding_is_not_read() -> None:
    tied, untied = size_of(SMOLLM2), size_of(MISTRAL)
    assert tied.read_per_token == tied.total
    assert untied.head == untied.embedding == 32768 * 4096
    assert untied.read_per_token == untied.total - untied.embedding


def test_a_folder_is_read_as_its_config_file_is(tiny_folder: Path) -> None:
    assert read_model(tiny_folder) == read_model(tiny_folder / "config.json")


@pytest.mark.parametrize("level", [0, 1])
def test_flops_of_a_forward_pass_are_what_torch_counts(shared: SharedLayers, tiny_folder: Path, level: int) -> None:
    model, packed = read_model(tiny_folder), pack(GROUPS)
    upper, angles = UpperLayers(shared.model, level, shared.num_layers), shared.angles(packed)
    hidden_GTD = shared.encode(packed, [level])[level]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden_GTD = upper(hidden_GTD, packed, angles)
        layers = counter.get_total_flops()
        completion_logprobs(hidden_GTD, shared.head, packed)
    num_rows, row = packed.tokens_GT.shape
    pairs = sum((span.end - span.begin) * (span.seen + span.end - span.begin) for each in packed.spans for span in each)
    assert layers == model.forward_flops(num_rows * row, pairs / (num_rows * row), 2 - level)
    assert counter.get_total_flops() - layers == model.head_flops(10)


def test_the_cache_holds_keys_and_values_of_all_layers(tiny_folder: Path, shared: SharedLayers) -> None:
    cache = shared.model(torch.tensor([[1, 2, 3]])).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert 3 * shared.model.dtype.itemsize * read_model(tiny_folder).cache_width == held


def test_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"there is no config\.json at "):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}))
    with pytest.raises(UnknownModelError, match="list of layers"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(UnknownModelError, match="no-such-model"):
        read_model(tmp_path)
