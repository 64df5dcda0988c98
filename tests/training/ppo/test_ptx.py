"""The pretraining mix: one step on the sum of both gradients, and a γ that is calibrated as defined."""

import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer

from training.config import LoraConfig, PtxConfig
from training.errors import TrainingError
from training.models.masters import trained
from training.models.policy import SharedLayers, UpperLayers, upper_layers_of
from training.ppo import ptx

DRAWN = [(3, 9, 27, 81, 5), (7, 14, 21), (100, 50, 25, 12)]


@pytest.fixture
def policy(shared: SharedLayers, tiny_folder: Path) -> UpperLayers:
    return upper_layers_of(tiny_folder, shared, 1, LoraConfig())


def gradients(policy: UpperLayers) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in [*trained(policy).values()] if parameter.grad is not None]


def set_gradients(policy: UpperLayers, scale: float) -> None:
    """Stands for PPO's gradient."""
    generator = torch.Generator().manual_seed(0)
    for parameter in [*trained(policy).values()]:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def test_the_gradient_is_that_of_the_mean_log_likelihood(shared: SharedLayers, policy: UpperLayers) -> None:
    loss = ptx.add_gradient(policy, shared, DRAWN, gamma=2.0, max_tokens=6)
    found = gradients(policy)
    model = shared.model.float()
    for index, layer in enumerate(policy.layers, start=policy.first):
        model.model.layers[index] = layer
    model.model.norm = policy.norm
    policy.zero_grad()
    total = torch.zeros(())
    for sequence in DRAWN:
        logprobs_TV = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        total = total - logprobs_TV[:-1].gather(-1, torch.tensor(sequence[1:])[:, None]).sum()
    plain = total / sum(len(sequence) - 1 for sequence in DRAWN)
    (2.0 * plain).backward()
    assert loss == pytest.approx(plain.item(), abs=0.02)
    expected = gradients(policy)
    difference = norm([a - b for a, b in zip(found, expected, strict=True)])
    assert difference < 0.03 * norm(expected)  # bf16 against fp32


@pytest.mark.parametrize("gamma", [0.5, 27.8])
def test_both_gradients_are_summed(shared: SharedLayers, policy: UpperLayers, gamma: float) -> None:
    ptx.add_gradient(policy, shared, DRAWN, gamma=1.0, max_tokens=64)
    alone = gradients(policy)
    set_gradients(policy, 0.3)
    ppo = gradients(policy)
    given = ptx.Gamma(PtxConfig(gamma=gamma))
    metrics = ptx.accumulate([*trained(policy).values()], policy, shared, DRAWN, given, max_tokens=64)
    assert metrics["ptx/gamma"] == gamma
    expected = [one + gamma * other for one, other in zip(ppo, alone, strict=True)]
    assert norm([a - b for a, b in zip(gradients(policy), expected, strict=True)]) < 0.01 * norm(
        expected
    )  # bf16 rounds what is scaled


def test_gamma_is_calibrated_to_the_ratio_of_norms_and_then_stays(shared: SharedLayers, policy: UpperLayers) -> None:
    gamma = ptx.Gamma(PtxConfig(grad_norm_ratio=0.5, num_calibration_steps=2))
    parameters = [*trained(policy).values()]
    ptx.add_gradient(policy, shared, DRAWN, gamma=1.0, max_tokens=64)
    alone = norm(gradients(policy))
    asked = []
    for scale in (0.1, 0.4):
        set_gradients(policy, scale)
        asked.append(0.5 * norm(gradients(policy)) / alone)
        ptx.accumulate(parameters, policy, shared, DRAWN, gamma, max_tokens=64)
    assert gamma.is_settled
    assert gamma.value == pytest.approx((asked[0] * asked[1]) ** 0.5, rel=1e-3)
    set_gradients(policy, 9.0)
    assert "ptx/grad_ratio" not in ptx.accumulate(parameters, policy, shared, DRAWN, gamma, max_tokens=64)


def test_texts_come_from_each_kind_of_file_again_and_again(tmp_path: Path, tiny_folder: Path) -> None:
    texts = [f"the garden number {i}" for i in range(5)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"body": t}) for t in texts).encode()))
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "c.parquet")
    for config in (
        PtxConfig(data=str(tmp_path / "c.parquet")),
        PtxConfig(data=str(tmp_path / "a.txt")),
        PtxConfig(data=str(tmp_path / "b.jsonl.gz"), text_field="body"),
    ):
        first, second = (list(itertools.islice(ptx.pretraining_texts(config, seed=1), 12)) for _ in "ab")
        assert first == second
        assert sorted(first[:5]) == texts
        assert set(first[5:10]) == set(texts)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    found = list(itertools.islice(ptx.sequences(iter(texts * 9), tokenizer, 16), 6))
    assert all(len(sequence) == 16 for sequence in found)
    joined = tokenizer.decode([token for sequence in found for token in sequence])
    assert "the garden number 0" in joined
    assert tokenizer.eos_token in joined


def test_a_text_that_names_a_control_token_does_not_end_there(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    (sequence,) = itertools.islice(ptx.sequences(iter(["a<|im_end|>b<|im_start|>"] * 9), tokenizer, 64), 1)
    ends = [index for index, token_id in enumerate(sequence) if token_id in tokenizer.added_tokens_decoder]
    assert {sequence[index] for index in ends} == {tokenizer.eos_token_id}
    assert tokenizer.decode(list(sequence[: ends[0]])) == "a<|im_end|>b<|im_start|>"


def test_a_dataset_of_several_parts_is_read_by_its_name_and_that_of_a_part(tmp_path: Path) -> None:
    for part in "ab":
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"text": f"of {part}"}) + "\n")
    parts = "".join(f"- config_name: {part}\n  data_files: {part}.jsonl\n" for part in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    assert next(ptx.pretraining_texts(PtxConfig(data=f"hf:{tmp_path}:b"), seed=0)) == "of b"
    for name in ("", ":c"):
        with pytest.raises(TrainingError, match=r"ptx\.data: hf:.* cannot be read"):
            next(ptx.pretraining_texts(PtxConfig(data=f"hf:{tmp_path}{name}"), seed=0))


def test_what_is_wrong_with_the_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(TrainingError, match=r"ptx\.text_field"):
        next(ptx.pretraining_texts(PtxConfig(data=str(tmp_path / "a.jsonl")), seed=0))
    with pytest.raises(TrainingError, match="no text"):
        next(ptx.pretraining_texts(PtxConfig(data=str(tmp_path / "empty.txt")), seed=0))
    with pytest.raises(TrainingError, match=r"ptx\.data"):
        next(ptx.pretraining_texts(PtxConfig(data=str(tmp_path / "missing.txt")), seed=0))


def test_a_dataset_of_the_hub_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(TrainingError, match=r"nobody/nothing cannot be loaded.*HF_HUB_OFFLINE"):
        next(ptx.pretraining_texts(PtxConfig(data="hf:nobody/nothing"), seed=0))
