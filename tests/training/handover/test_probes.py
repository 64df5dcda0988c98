"""Probes have the saved policy's own log-probabilities, and the folder has all that a server needs."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from training.config import LoraConfig
from training.handover.probes import MAX_PROBE_TOKENS, probes_of
from training.models.policy import ModelMismatchError, SharedLayers, load_model, save_policy, upper_layers_of

SEQUENCES = [tuple(range(3, 3 + 100)), (1,), (1, 7, 7, 2), (4, 4)]


@pytest.fixture
def saved(shared: SharedLayers, tiny_folder: Path, tmp_path: Path) -> Path:
    upper = upper_layers_of(tiny_folder, shared, 1, LoraConfig())
    with torch.no_grad():
        for parameter in upper.parameters():
            parameter.mul_(1.2)
    save_policy(tmp_path, shared, upper, tiny_folder)
    return tmp_path


def test_probes_equal_a_recomputation_from_the_saved_weights(saved: Path, tiny_folder: Path) -> None:
    own, old = probes_of(saved, SEQUENCES, 2), probes_of(tiny_folder, SEQUENCES, 2)
    model = load_model(saved).float()
    for probe, before in zip(own, old, strict=True):
        tokens = torch.tensor(list(probe.token_ids))
        logprobs_TV = model(tokens[None]).logits[0].log_softmax(-1)
        expected_T = logprobs_TV[:-1].gather(-1, tokens[1:, None])[:, 0]
        assert len(probe.logprobs) == len(probe.token_ids) - 1
        torch.testing.assert_close(torch.tensor(list(probe.logprobs)), expected_T, atol=0.05, rtol=0)
        assert list(probe.logprobs) != list(before.logprobs)
    # A single token predicts nothing.
    assert [len(probe.token_ids) for probe in own] == [MAX_PROBE_TOKENS, 4]


def test_a_saved_policy_has_its_tokenizer_and_can_be_trained_on(
    saved: Path, tiny_folder: Path, shared: SharedLayers
) -> None:
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (saved, tiny_folder)]
    assert tokenizers[0].encode("the garden") == tokenizers[1].encode("the garden")
    assert {file.name for file in saved.iterdir()} == {file.name for file in tiny_folder.iterdir()}
    assert upper_layers_of(saved, shared, 1, LoraConfig()).first == 1


def test_a_policy_on_other_lower_layers_is_refused(saved: Path, shared: SharedLayers) -> None:
    with pytest.raises(ModelMismatchError, match=r"model\.layers\.1"):
        upper_layers_of(saved, shared, 2, LoraConfig())
