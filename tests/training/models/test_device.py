"""In either precision, weights are read and written in bf16, and results differ little."""

from pathlib import Path

import pytest
import torch

from policies.precision import compute_dtype
from training.config import LoraConfig
from training.data.groups import Group, pack
from training.models.device import autocast
from training.models.policy import SharedLayers, completion_logprobs, load_model, merged_weights, upper_layers_of
from training.models.tensor_file import load_weights

CPU = torch.device("cpu")
PACKED = pack([Group((3, 4, 5), ((40, 41, 42), (50, 51)))])


def logprobs_and_weights(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    shared = SharedLayers(load_model(folder))
    policy = upper_layers_of(folder, shared, 1, LoraConfig())
    with torch.no_grad(), autocast(shared.device):
        hidden_GTD = policy(shared.encode(PACKED, [1])[1], PACKED, shared.angles(PACKED))
    return completion_logprobs(hidden_GTD, shared.head, PACKED), merged_weights(shared, policy)


def test_a_gpu_computes_in_bf16_whatever_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", lambda: False)
    assert compute_dtype(torch.device("cuda")) is torch.bfloat16
    assert compute_dtype(CPU) is torch.float32


def test_both_precisions_read_and_write_the_same_weights(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = load_weights(tiny_folder)
    found = {}
    for in_bf16 in (True, False):
        monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", lambda in_bf16=in_bf16: in_bf16)
        found[in_bf16], weights = logprobs_and_weights(tiny_folder)
        assert weights.keys() == saved.keys()
        assert all(torch.equal(weights[name], saved[name]) for name in saved)
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not torch.equal(found[True], found[False])
    torch.testing.assert_close(found[True], found[False], atol=0.05, rtol=0)
