"""Each family of docs/models.md, as a tiny random model: computed, trained, saved and planned as itself, or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.training.models.families import BEGIN, END, REFUSED, SUPPORTED, TABLE, make_family, table
from training.config import LoraConfig, RewardModelConfig
from training.data.groups import Group, pack
from training.errors import TrainingError
from training.handover.probes import probes_of
from training.models import trial
from training.models.policy import SharedLayers, completion_logprobs, load_model, save_policy, upper_layers_of
from training.models.reward import RewardModel, features_of
from training.models.trial import UnsupportedModelError, check_forward, difference
from training.models.value import ValueModel
from training.planning.model_size import UnknownModelError, read_model

# transformers names settings that suit no tiny model.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LEVEL = 1
PROMPT, COMPLETIONS = (1, 9, 8, 7, 30), ((40, 41, 42, 43, 44, 45, 46, 47, 2), (50, 51, 52, 53))
PACKED = pack([Group(PROMPT, COMPLETIONS), Group((1, 60), ((61, 62), (63,)))])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each family."""
    folder = tmp_path_factory.mktemp("families")
    for family, settings in {**SUPPORTED, **REFUSED}.items():
        make_family(family, settings, folder / family)
    return folder


def test_the_table_of_models_is_what_the_trial_finds(models: Path) -> None:
    page = TABLE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == table(models), "run python -m tests.training.models.families"
    assert tuple(SUPPORTED) == trial.SUPPORTED


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_trainer_computes_a_family_as_the_model_does(models: Path, family: str) -> None:
    """Far closer than the trial asks: what is left is rounding."""
    assert difference(models / family, AutoConfig.from_pretrained(models / family)) < 2e-5


@pytest.mark.parametrize(
    ("family", "rank"),
    [
        *((family, 0) for family in SUPPORTED),
        # With biases, joined matrices, norms between, and other names in files.
        *((family, 2) for family in ("gemma3_text", "gpt_neox", "phi", "phi3", "qwen2")),
    ],
)
def test_all_that_is_trained_of_a_family_gets_a_gradient_and_is_saved(
    in_fp32: None, models: Path, tmp_path: Path, family: str, rank: int
) -> None:
    shared = SharedLayers(load_model(models / family))
    upper = upper_layers_of(models / family, shared, LEVEL, LoraConfig(rank=rank))
    optimizer = torch.optim.SGD((each for each in upper.parameters() if each.requires_grad), lr=0.1)
    for _ in range(2 if rank else 1):
        normed_GTD = upper(shared.encode(PACKED, [LEVEL])[LEVEL], PACKED, shared.angles(PACKED))
        logprobs_NC = completion_logprobs(normed_GTD, shared.head, PACKED)
        optimizer.zero_grad()
        # Each token has a weight of its own, so that nothing cancels out.
        (logprobs_NC * torch.linspace(-1, 1, logprobs_NC.numel()).view_as(logprobs_NC)).sum().backward()
        optimizer.step()
    without = [
        name
        for name, each in upper.named_parameters()
        if each.requires_grad and not (each.grad is not None and each.grad.isfinite().all() and each.grad.any())
    ]
    # A softmax does not see what is added to all its logits, as a bias of all keys does where there is no rotation.
    assert [name for name in without if not name.endswith("k_proj.bias")] == []
    (tmp_path / "v2").mkdir()
    save_policy(tmp_path / "v2", shared, upper, models / family)
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "v2", output_loading_info=True)
    assert not any(found.values())
    before, after = load_file(models / family / "model.safetensors"), load_file(tmp_path / "v2" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "granite", "mistral", "qwen2"])
def test_reward_and_value_model_read_the_states_of_the_models_own_pass(
    in_fp32: None, models: Path, family: str
) -> None:
    """They begin in the middle of the model, where layers must still be taken for what they are."""
    shared = SharedLayers(load_model(models / family))
    rewards = RewardModel(shared, RewardModelConfig(num_layers=3, num_trained_layers=2))
    with torch.no_grad():
        rewards.heads_FE.copy_(torch.randn(rewards.heads_FE.shape, generator=torch.Generator().manual_seed(1)))
        values_NC = ValueModel(rewards)(shared.encode(PACKED, [1])[1], PACKED, shared.angles(PACKED))
        features_NF = features_of(rewards, PACKED)
    model = AutoModelForCausalLM.from_pretrained(models / family, dtype=torch.float32, attn_implementation="eager")
    for index, completion in enumerate(COMPLETIONS):
        with torch.no_grad():
            states_TD = model(torch.tensor([PROMPT + completion]), output_hidden_states=True).hidden_states[3][0]
        read_TD = states_TD[len(PROMPT) - 1 :]
        expected_F = torch.cat([read_TD[-1], read_TD.mean(0)])
        torch.testing.assert_close(features_NF[index], expected_F, atol=1e-4, rtol=1e-4)
        before_F = torch.cat([read_TD[-2], read_TD[:-1].mean(0)])
        assert float(values_NC[index, len(completion) - 1]) == pytest.approx(float(rewards.score(before_F)), abs=1e-3)


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_plan_counts_the_parameters_of_a_family(models: Path, family: str) -> None:
    tensors = load_file(models / family / "model.safetensors")
    assert read_model(models / family).total == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("family", ["gemma2", "granite", "mistral", "phi"])
def test_probes_of_a_family_are_the_models_own_logprobs(in_fp32: None, models: Path, family: str) -> None:
    tokens = list(PROMPT + COMPLETIONS[0])
    (probe,) = probes_of(models / family, [tokens], 1)
    model = AutoModelForCausalLM.from_pretrained(models / family, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = [float(logprobs_TV[place, token]) for place, token in enumerate(tokens[1:])]
    assert list(probe.logprobs) == pytest.approx(expected, abs=1e-4)


def test_what_the_trainer_would_compute_otherwise_is_refused_with_what_to_do(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.models.anatomy.windows_of", lambda config: (None,) * config.num_hidden_layers)
    with pytest.raises(UnsupportedModelError) as refused:
        check_forward(models / "mistral")
    assert "MistralForCausalLM (mistral)" in str(refused.value)
    assert "nats a token on average" in str(refused.value)
    assert "llama" in str(refused.value)


def test_a_model_whose_layers_are_said_to_rotate_by_the_longest_row_is_refused(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "llama", tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match='"dynamic"'):
        check_forward(folder)


def test_missing_weights_are_no_verdict_on_the_architecture(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "llama", tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        TrainingError, match=r"lack 1 tensors, such as model\.layers\.2\.mlp\.up_proj\.weight"
    ) as raised:
        check_forward(folder)
    assert not isinstance(raised.value, UnsupportedModelError)


def test_a_plan_of_a_refused_model_says_why(models: Path) -> None:
    with pytest.raises(UnknownModelError, match="list of layers"):
        read_model(models / "gpt2")
