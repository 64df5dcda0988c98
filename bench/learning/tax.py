"""The alignment tax: what a policy has lost of the language model it came from (InstructGPT, section 4.2).

It is measured twice, without generation: by the loss on WikiText-2, and by the accuracy on HellaSwag (Zellers et al.,
arXiv 1905.07830) as EleutherAI's lm-evaluation-harness scores it. The tax is the paired `change` of a measure from one
policy to another. Shapes: see training.data.groups; E counts endings, and I is an axis of one.
"""

from __future__ import annotations

import bz2
import gzip
import math
import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.learning.data import data_file
from policies.encoding import plain_token_ids
from training.data.groups import Group
from training.models.policy import SharedLayers, reference_logprobs

_ITEM_LINES = 6
_SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Measure:
    """The values of a measure, window by window or item by item, in order."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise ValueError(f"a standard error needs two values at least, not {len(self.values)}")

    @property
    def mean(self) -> float:
        """The mean of all values."""
        return statistics.fmean(self.values)

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, as if the values were drawn at random."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values))


@dataclass(frozen=True)
class HellaSwagItem:
    """The beginning of a text and four endings of it, of which the one numbered `label` is the real one."""

    context: str
    endings: tuple[str, ...]
    label: int


def change(before: Measure, after: Measure) -> Measure:
    """Returns the changes on the same windows or items, whose mean is far surer than the difference of two means.

    Raises:
        ValueError: the two measures have different numbers of values.
    """
    return Measure(tuple(new - old for old, new in zip(before.values, after.values, strict=True)))


def read_wikitext(part: Literal["valid", "test"]) -> str:
    """Returns WikiText-2 as text for reading: white space is back where people put it; <unk> stays.

    Raises:
        DataMissingError: the data set is not there.
    """
    with gzip.open(data_file(f"wikitext-2/{part}.txt.gz"), "rt", encoding="utf-8") as file:
        return _natural(file.read())


def _natural(text: str) -> str:
    """Undoes WikiText's separation of punctuation from words."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r' " ([^"\n]*) "', r' "\1"', text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r" ([.,;:!?)\]]|'(?:s|t|re|m|ve|ll|d)\b|'(?= ))", r"\1", text)
    return re.sub(r" *\n[ \n]*", "\n\n", text).strip()


def read_hellaswag() -> list[HellaSwagItem]:
    """Returns HellaSwag's validation items, in one fixed random order: the first n are a fair sample of size n.

    Raises:
        DataMissingError: the data set is not there.
        ValueError: the file does not have six lines an item.
    """
    # Not splitlines, which also splits at characters that occur inside texts.
    lines = bz2.decompress(data_file("hellaswag/hellaswag_val_full.txt.bz2").read_bytes()).decode().rstrip().split("\n")
    if len(lines) % _ITEM_LINES:
        raise ValueError(f"HellaSwag has {len(lines)} lines, not {_ITEM_LINES} an item")
    items = [parse_item(lines[start : start + _ITEM_LINES]) for start in range(0, len(lines), _ITEM_LINES)]
    random.Random(_SHUFFLE_SEED).shuffle(items)
    return items


def parse_item(lines: Sequence[str]) -> HellaSwagItem:
    """Reads "activity: context", the label and the four endings, and preprocesses them as the harness does.

    The harness also capitalises the unfinished last sentence of a video's context, the only one in lower case. In this
    form of the data that sentence has already been joined to the rest.

    Raises:
        ValueError: the label is not 0, 1, 2 or 3.
    """
    context, label, *endings = lines
    if label not in {"0", "1", "2", "3"}:
        raise ValueError(f"HellaSwag: {label!r} is not a label, after {context!r}")
    context = re.sub(r"(?<=[.!?] )[a-z](?=[^.!?]*$)", lambda match: match[0].upper(), context)
    return HellaSwagItem(_preprocess(context), tuple(map(_preprocess, endings)), int(label))


def _preprocess(text: str) -> str:
    """Removes what WikiHow's markup left in brackets, and the gaps that leaves."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@torch.no_grad()
def wikitext_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int, window: int
) -> Measure:
    """Returns the loss in nats a token of each whole window of `window` tokens in the first `num_tokens` of `text`.

    Windows do not see each other, so the first token of each is not predicted. Computes in the model's own precision,
    bf16 as training.models.policy loads it.

    Raises:
        ValueError: there are fewer than two windows.
    """
    token_ids = plain_token_ids(tokenizer, text)[:num_tokens]
    starts = range(0, len(token_ids) - window + 1, window)
    windows = torch.tensor([token_ids[start : start + window] for start in starts], dtype=torch.long)
    return Measure(tuple(_window_loss(model, tokens_IT.to(model.device)) for tokens_IT in windows.split(1)))


def _window_loss(model: PreTrainedModel, tokens_IT: Tensor) -> float:
    logits_TV = model(input_ids=tokens_IT, use_cache=False).logits[0, :-1]
    return cross_entropy(logits_TV.float(), tokens_IT[0, 1:]).item()


def hellaswag_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[HellaSwagItem]
) -> Measure:
    """Returns 1 for each item whose real ending has the highest log-likelihood per character, else 0.

    This is the harness's acc_norm.

    Raises:
        ValueError: there are fewer than two items.
    """
    logprobs_NE = ending_logprobs(model, tokenizer, items)
    lengths_NE = torch.tensor([[len(ending) for ending in item.endings] for item in items])
    chosen_N = (logprobs_NE / lengths_NE).argmax(-1)
    return Measure(tuple(float(chosen == item.label) for chosen, item in zip(chosen_N.tolist(), items, strict=True)))


def ending_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[HellaSwagItem]
) -> Tensor:
    """Returns the log-likelihood of each ending of N items after its context, [N, E] in fp32 and in nats.

    Each context is encoded once for all its endings. The model must have the layers of a Llama.
    """
    groups = [_group(tokenizer, item) for item in items]
    return torch.tensor(reference_logprobs(SharedLayers(model), groups)).view(len(items), -1)


def _group(tokenizer: PreTrainedTokenizerBase, item: HellaSwagItem) -> Group:
    """Returns an item's context and endings as tokens.

    An ending's tokens are what the whole text has beyond the context's tokens, since a space belongs to the word after
    it.
    """
    context = tuple(plain_token_ids(tokenizer, item.context))
    wholes = [plain_token_ids(tokenizer, f"{item.context} {ending}") for ending in item.endings]
    return Group(context, tuple(tuple(whole[len(context) :]) for whole in wholes))
