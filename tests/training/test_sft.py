"""Supervised fine-tuning: demonstrations become likelier, their prompts do not, the reward model picks the epoch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from training.config import SftConfig
from training.data.demonstrations import Demonstration
from training.errors import TrainingError
from training.models.logprobs import Head, label_logprobs
from training.models.policy import load_model
from training.models.tensor_file import load_weights
from training.sft import Epoch, fine_tune

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

EOS = 2
DEMONSTRATIONS = [Demonstration((1, 40 + i, 7), (90 + i, 91, 92, EOS)) for i in range(24)]
CONFIG = SftConfig(num_epochs=3, learning_rate=5e-3, batch_size=8)


def mean_logprob(folder: Path, weights: dict[str, Tensor], which: slice) -> float:
    """Returns the mean log-probability of the demonstrations' tokens in this slice, each given the tokens before it."""
    model = load_model(folder)
    model.load_state_dict(weights, strict=False)
    tokens_NT = torch.tensor([[*each.prompt, *each.completion] for each in DEMONSTRATIONS])
    hidden_NTD = model.model(tokens_NT).last_hidden_state
    places = range(tokens_NT.shape[1])[which]
    hidden_MD = hidden_NTD[:, [place - 1 for place in places]].flatten(0, 1)
    head_VD = model.get_output_embeddings().weight
    return float(label_logprobs(hidden_MD, Head(head_VD), tokens_NT[:, list(places)].flatten()).mean())


def test_the_epoch_with_the_highest_score_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    scores, seen = iter([0.1, 0.9, 0.3]), []
    given: list[dict[str, Tensor]] = []

    def score_of(weights: dict[str, Tensor]) -> float:
        given.append(weights)
        return next(scores)

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    weights, epochs = fine_tune(
        tiny_folder, tokenizer, DEMONSTRATIONS, score_of, CONFIG, tmp_path, seed=0, log=seen.append
    )
    assert epochs == seen
    assert [epoch.score for epoch in epochs] == [0.1, 0.9, 0.3]
    assert epochs[0].loss > epochs[-1].loss
    assert all(torch.equal(tensor, given[1][name]) for name, tensor in weights.items())
    assert set(weights) == set(load_weights(tiny_folder))

    before = load_weights(tiny_folder)
    completion, prompt = slice(3, 7), slice(1, 2)
    assert mean_logprob(tiny_folder, weights, completion) > mean_logprob(tiny_folder, before, completion) + 1
    # Only prompts have the second token, one of 24 of the vocabulary, so that it is never trained on.
    assert mean_logprob(tiny_folder, weights, prompt) < mean_logprob(tiny_folder, before, prompt) + 1


def test_micro_batches_change_memory_and_not_what_is_learned(tiny_folder: Path, tmp_path: Path, in_fp32: None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    losses, likelier = [], []
    for size in (8, 2):
        config = CONFIG.model_copy(update={"num_epochs": 2, "micro_batch_size": size})
        weights, epochs = fine_tune(
            tiny_folder, tokenizer, DEMONSTRATIONS, lambda _: 0.0, config, tmp_path / str(size), seed=0, log=str
        )
        losses += [[epoch.loss for epoch in epochs]]
        likelier.append(mean_logprob(tiny_folder, weights, slice(3, 7)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert likelier[0] == pytest.approx(likelier[1], rel=1e-2)


class KilledError(Exception):
    """Stands for a kill of the process."""


SCORES = (0.1, 0.9, 0.3)


def tuned(
    folder: Path, scratch: Path, first: int = 0, scoring: int | None = None, logging: int | None = None
) -> tuple[dict[str, Tensor], list[Epoch], list[Epoch]]:
    """Fine-tunes, and expects that `first` is the first epoch.

    It is killed while it scores the epoch `scoring` or logs the epoch `logging`. Returns the weights, all epochs, and
    the epochs that it logged.
    """
    left, logged = list(range(first, len(SCORES))), []

    def score_of(weights: dict[str, Tensor]) -> float:
        epoch = left.pop(0)
        if epoch == scoring:
            raise KilledError
        return SCORES[epoch]

    def log(epoch: Epoch) -> None:
        if epoch.index == logging:
            raise KilledError
        logged.append(epoch)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights, epochs = fine_tune(folder, tokenizer, DEMONSTRATIONS, score_of, CONFIG, scratch, seed=0, log=log)
    return weights, epochs, logged


@pytest.mark.parametrize("moment", ["scoring", "logging"])
@pytest.mark.parametrize("epoch", range(len(SCORES)))
def test_killed_in_any_epoch_it_resumes_to_the_same_bits(
    epoch: int, moment: str, tiny_folder: Path, tmp_path: Path
) -> None:
    weights, epochs, _ = tuned(tiny_folder, tmp_path / "alive")
    scratch = tmp_path / "killed"
    with pytest.raises(KilledError):
        tuned(tiny_folder, scratch, **{moment: epoch})
    # A kill while a checkpoint is written leaves this.
    (scratch / "checkpoint-9").mkdir(parents=True, exist_ok=True)
    (scratch / "checkpoint-9" / "trainer_state.json").write_text('{"epoch"')
    resumed, found, logged = tuned(tiny_folder, scratch, first=epoch)
    assert (found, logged) == (epochs, epochs[epoch:])
    assert set(resumed) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.items())
    assert {path.name for path in scratch.glob("*-*")} == {"checkpoint-9", "epoch-1.safetensors"}


def test_killed_after_its_last_epoch_it_trains_no_more(tiny_folder: Path, tmp_path: Path) -> None:
    weights, epochs, _ = tuned(tiny_folder, tmp_path)
    again, found, logged = tuned(tiny_folder, tmp_path, first=len(SCORES))
    assert (found, logged) == (epochs, [])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())


def test_too_few_or_too_long_demonstrations_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for config in (SftConfig(min_demonstrations=25), SftConfig(max_tokens=5)):
        with pytest.raises(TrainingError, match=r"sft\.min_demonstrations"):
            fine_tune(
                tiny_folder, tokenizer, DEMONSTRATIONS, lambda _: 0.0, config, tmp_path, seed=0, log=lambda _: None
            )
