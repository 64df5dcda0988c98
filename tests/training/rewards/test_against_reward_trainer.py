"""A ranking of K in one term of our loss is what TRL's RewardTrainer makes of its K (K - 1) / 2 pairs, in float32.

TRL encodes the prompt and both completions of every pair anew; we encode the prompt once and each completion once.
Loss and gradients are the same all the same.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from feedback.store.comparisons import comparisons
from training.config import RewardModelConfig
from training.data.groups import Group, pack
from training.models.policy import SharedLayers
from training.models.reward import RewardModel, features_of
from training.rewards.loss import compare, ranking_losses

RANKS = (2, 0, 1, 1)  # a tie is no pair
CLOSE = {"rtol": 1e-4, "atol": 1e-6}

pytestmark = [
    pytest.mark.usefixtures("in_fp32"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture
def group() -> Group:
    drawn = random.Random(0)
    prompt, *completions = (tuple(drawn.randrange(8, 100) for _ in range(length)) for length in (7, 5, 3, 9, 6))
    return Group(prompt, tuple(completions))


@pytest.fixture
def scored(tiny_folder: Path) -> PreTrainedModel:
    """The tiny model with a random score."""
    torch.manual_seed(0)
    return LlamaForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, dtype=torch.float32)


def loss_of_trl(scored: PreTrainedModel, group: Group, tokenizer: Any, folder: Path) -> Tensor:
    """All pairs of the ranking in one batch."""
    rows = [
        {
            "chosen_ids": [*group.prompt, *group.completions[chosen]],
            "rejected_ids": [*group.prompt, *group.completions[rejected]],
        }
        for chosen, rejected in comparisons(RANKS)
    ]
    config = RewardConfig(
        output_dir=str(folder), per_device_train_batch_size=len(rows), max_length=None, bf16=False, use_cpu=True,
        gradient_checkpointing=False, dataloader_pin_memory=False, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=scored, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    (batch,) = trainer.get_train_dataloader()
    loss: Tensor = trainer.compute_loss(scored, batch)
    return loss


def ours(scored: PreTrainedModel, tiny_folder: Path) -> RewardModel:
    """Returns the same model as ours: it owns all layers, and its head does not read the mean state."""
    body: Any = scored.get_submodule("model")
    language_model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).requires_grad_(False).eval()
    shared = SharedLayers(language_model)
    config = RewardModelConfig(num_layers=shared.num_layers, num_trained_layers=shared.num_layers, num_heads=2)
    model = RewardModel(shared, config)
    model.layers.load_state_dict(body.layers.state_dict())
    model.norm.load_state_dict(body.norm.state_dict())
    head: Any = scored.get_submodule("score")
    with torch.no_grad():
        model.heads_FE[: head.weight.shape[1]] = head.weight.T
    return model.requires_grad_(True)


def test_loss_and_gradients_of_a_ranking_are_those_of_its_pairs(
    scored: PreTrainedModel, group: Group, tiny_folder: Path, tmp_path: Path
) -> None:
    model = ours(scored, tiny_folder)
    found = ranking_losses(features_of(model, pack([group])) @ model.heads_FE, compare([RANKS]), torch.ones(1, 2))
    trl = loss_of_trl(scored, group, AutoTokenizer.from_pretrained(tiny_folder), tmp_path)
    # Ours divides by all (K choose 2) pairs, TRL by those that are no ties.
    share = len(comparisons(RANKS)) / 6
    torch.testing.assert_close(found, (trl * share).expand(2), **CLOSE)

    trl.backward()
    found.mean().backward()
    body: Any = scored.get_submodule("model")
    for name, parameter in model.layers.named_parameters():
        expected = body.layers.get_parameter(name).grad * share
        torch.testing.assert_close(parameter.grad, expected, **CLOSE)
