"""The alignment tax: losses and accuracies equal to naive ones."""

import bz2
import gzip
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.learning import tax
from deploy.models import make_tiny_llama
from training.models import policy as policy_model
from training.models.policy import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return load_model(folder)


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


ITEMS = [
    tax.HellaSwagItem("Cooking: A man cuts a tomato. He", ("eats it.", "puts it in the soil again.", "is blue"), 0),
    tax.HellaSwagItem("Sleep: The room is dark and cool. She", ("sleeps", "goes to bed at the same time", "red"), 1),
    tax.HellaSwagItem("Why", ("is the sky blue?", "not?", ", then, do you garden so often"), 2),
]


def naive_logprob(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, ending: str) -> float:
    whole = tokenizer.encode(f"{context} {ending}", add_special_tokens=False)
    first = len(tokenizer.encode(context, add_special_tokens=False))
    logits_TV = model(torch.tensor([whole], device=model.device)).logits[0]
    logprobs_TV = torch.log_softmax(logits_TV.double(), -1)
    return sum(logprobs_TV[place - 1, whole[place]].item() for place in range(first, len(whole)))


def test_endings_scored_in_one_row_equal_a_loop_over_each(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.float()
    expected = [[naive_logprob(model, tokenizer, i.context, e) for e in i.endings] for i in ITEMS]
    found_NE = tax.ending_logprobs(model, tokenizer, ITEMS)
    torch.testing.assert_close(found_NE.double(), torch.tensor(expected).double(), atol=1e-3, rtol=0)
    # The values are the same if every item is a batch of its own.
    monkeypatch.setattr(policy_model, "SCORING_TOKENS", 1)
    torch.testing.assert_close(tax.ending_logprobs(model, tokenizer, ITEMS), found_NE, atol=1e-3, rtol=0)


def test_accuracy_is_of_the_best_log_likelihood_per_character(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.float()
    best = []
    for item in ITEMS:
        scores = [naive_logprob(model, tokenizer, item.context, e) / len(e) for e in item.endings]
        best.append(scores.index(max(scores)))
    right = [tax.HellaSwagItem(i.context, i.endings, label) for i, label in zip(ITEMS, best, strict=True)]
    wrong = tax.HellaSwagItem(ITEMS[0].context, ITEMS[0].endings, (best[0] + 1) % 3)
    found = tax.hellaswag_accuracy(model, tokenizer, [*right, wrong])
    assert found.values == (1.0, 1.0, 1.0, 0.0)
    assert found.mean == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_loss_is_the_mean_over_each_window_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.float()
    text = (
        "What is the best way to learn to cook at home? Start with a few simple meals <|im_end|> and make them often."
    )
    token_ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    found = tax.wikitext_loss(model, tokenizer, text, num_tokens=22, window=7)
    assert len(token_ids) > 22
    assert len(found.values) == 3
    for index, value in enumerate(found.values):
        window = token_ids[7 * index : 7 * index + 7]
        logits_TV = model(torch.tensor([window], device=model.device)).logits[0]
        logprobs_TV = torch.log_softmax(logits_TV.double(), -1)
        expected = -sum(logprobs_TV[i, token].item() for i, token in enumerate(window[1:])) / 6
        assert value == pytest.approx(expected, abs=1e-4)


def test_text_too_short_for_a_standard_error_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="two values at least, not 1"):
        tax.wikitext_loss(model, tokenizer, "The sky is blue because the air scatters light.", num_tokens=10, window=8)


def test_change_is_paired() -> None:
    found = tax.change(tax.Measure((1.0, 5.0, 9.0)), tax.Measure((1.5, 5.5, 9.5)))
    assert (found.mean, found.standard_error) == (0.5, 0.0)
    with pytest.raises(ValueError, match="shorter"):
        tax.change(tax.Measure((1.0, 2.0, 3.0)), tax.Measure((1.0, 2.0)))


def test_wikitext_is_read_as_people_wrote_it(data: Path) -> None:
    raw = ' \n = Home = \n \n The co @-@ op sold 2 @,@ 500 loaves ( at $ 1 @.@ 50 ) ; she didn \'t say " no " , he said'
    (data / "wikitext-2").mkdir()
    (data / "wikitext-2" / "valid.txt.gz").write_bytes(gzip.compress(raw.encode()))
    text = '= Home =\n\nThe co-op sold 2,500 loaves (at $ 1.50); she didn\'t say "no", he said'
    assert tax.read_wikitext("valid") == text


def test_hellaswag_is_read_and_preprocessed_as_the_harness_does(data: Path) -> None:
    lines = ["Roof: A man sits [up]  here. he", "3", "a.", "b [substeps] c.", "d.", "e. "]
    lines += ["Home: How to rest [title] Lie down", "0", "w", "x\u2028y", "y", "z"]
    (data / "hellaswag").mkdir()
    path = data / "hellaswag" / "hellaswag_val_full.txt.bz2"
    path.write_bytes(bz2.compress("\n".join([*lines, ""]).encode()))
    assert sorted(tax.read_hellaswag(), key=lambda item: item.label) == [
        tax.HellaSwagItem("Home: How to rest. Lie down", ("w", "x\u2028y", "y", "z"), 0),
        tax.HellaSwagItem("Roof: A man sits  here. He", ("a.", "b c.", "d.", "e."), 3),
    ]
    path.write_bytes(bz2.compress("\n".join(lines[:-1]).encode()))
    with pytest.raises(ValueError, match="has 11 lines"):
        tax.read_hellaswag()
    with pytest.raises(ValueError, match="'4' is not a label"):
        tax.parse_item(["Roof: x", "4", "a", "b", "c", "d"])
