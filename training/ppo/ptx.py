"""The pretraining mix of PPO-ptx: + γ E[log π(x)] on pretraining text x (InstructGPT, equation 2).

Its gradient is accumulated with PPO's into one optimizer step. Two steps through one Adam state, each with its own
clipping, would cancel γ. The paper's γ of 27.8 belongs to a scale of the loss that the paper does not state. Our loss
is the mean over tokens, and γ is calibrated so that the pretraining gradient is `grad_norm_ratio` times as long as
PPO's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from feedback import heartbeat
from policies.encoding import plain_token_ids
from policies.end_tokens import end_tokens
from training.config import PtxConfig
from training.data.groups import Group, pack
from training.errors import TrainingError
from training.models.device import autocast
from training.models.parallel import ALONE, Ranks, micro_batches_in_step, summed, whole
from training.models.policy import SharedLayers, UpperLayers, completion_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHUFFLE_BUFFER = 1000
_FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


def pretraining_texts(config: PtxConfig, seed: int) -> Iterator[str]:
    """Yields the texts that `config.data` names, in random order, epoch after epoch.

    Raises:
        TrainingError: they cannot be read, or there are none.
    """
    # datasets takes seconds to import, and plain PPO does not need it.
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    if config.data.startswith("hf:"):
        source, _, subset = config.data.removeprefix("hf:").partition(":")
        arguments = {"name": subset} if subset else {}
    else:
        path = Path(config.data)
        suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
        if suffix not in _FORMATS or not path.is_file():
            raise TrainingError(
                f"ptx.data: {path} should be a file named {', '.join(_FORMATS)}, or one of these and .gz"
            )
        source, arguments = _FORMATS[suffix], {"data_files": str(path)}
    try:
        dataset = load_dataset(source, split="train", streaming=True, **arguments)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise TrainingError(
            f"ptx.data: {config.data} cannot be loaded: {error}. Set HF_HUB_OFFLINE=0 to have datasets downloaded"
        ) from error
    except ValueError as error:
        # The dataset has no such part, or has several of which none was named, or has no training split.
        raise TrainingError(f"ptx.data: {config.data} cannot be read: {error}") from error
    for epoch in itertools.count():
        num_texts = 0
        for row in dataset.shuffle(seed=seed + epoch, buffer_size=_SHUFFLE_BUFFER):
            if config.text_field not in row:
                raise TrainingError(f"ptx.text_field: {config.data} has {', '.join(row)}, but no {config.text_field!r}")
            text = row[config.text_field] or ""
            if text.strip():
                num_texts += 1
                yield text
        if not num_texts:
            raise TrainingError(f"ptx.data: there is no text in {config.data}")


def sequences(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Iterator[tuple[int, ...]]:
    """Yields sequences of `num_tokens` tokens, cut from the texts laid end to end with an end token after each.

    A text that names a control token is text.
    """
    end_token_id = end_tokens(tokenizer).of_text
    waiting: list[int] = []
    for text in heartbeat.each(texts):
        waiting += [*plain_token_ids(tokenizer, text), end_token_id]
        while len(waiting) >= num_tokens:
            yield tuple(waiting[:num_tokens])
            del waiting[:num_tokens]


def add_gradient(
    policy: UpperLayers,
    shared: SharedLayers,
    drawn: Sequence[tuple[int, ...]],
    gamma: float,
    max_tokens: int,
    ranks: Ranks = ALONE,
) -> float:
    """Adds the gradient of -γ mean log π(x) to the policy's. Returns the loss without γ, in nats a token.

    `drawn` are sequences of 2 tokens or more; of each the first token is given, and the others are predicted. Several
    ranks divide them.
    """
    groups = [Group(sequence[:1], (sequence[1:],)) for sequence in drawn]
    num_tokens, total = sum(len(sequence) - 1 for sequence in drawn), 0.0
    for batch in micro_batches_in_step(ranks, [len(group) for group in groups], max_tokens):
        packed = pack([groups[index] for index in batch]).to(shared.device)
        input_GTD = shared.encode(packed, [policy.first])[policy.first]
        with autocast(shared.device):
            hidden_GTD = policy(input_GTD, packed, shared.angles(packed))
        loss = -completion_logprobs(hidden_GTD, shared.head, packed).sum() / num_tokens
        (gamma * loss).backward()
        total += loss.item()
    return summed(ranks, {"loss": total})["loss"]


@dataclass
class Gamma:
    """γ, as it was set, or calibrated: the geometric mean of the γ that each of the first optimizer steps asked for."""

    config: PtxConfig
    asked: list[float] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Whether γ does not change any more."""
        return self.config.gamma is not None or len(self.asked) >= self.config.num_calibration_steps

    @property
    def value(self) -> float:
        """The present γ."""
        if self.config.gamma is not None:
            return self.config.gamma
        return math.exp(sum(map(math.log, self.asked)) / len(self.asked))


def accumulate(
    parameters: Sequence[nn.Parameter],
    policy: UpperLayers,
    shared: SharedLayers,
    drawn: Sequence[tuple[int, ...]],
    gamma: Gamma,
    max_tokens: int,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Adds γ times the pretraining gradient to PPO's gradient in `parameters`. First it calibrates γ, unless settled.

    Returns the figures by their names in metrics.jsonl.
    """
    if gamma.is_settled:
        loss = add_gradient(policy, shared, drawn, gamma.value, max_tokens, ranks)
        return {"ptx/loss": loss, "ptx/gamma": gamma.value}
    ppo_gradients = [_take_gradient(parameter) for parameter in parameters]
    loss = add_gradient(policy, shared, drawn, 1.0, max_tokens, ranks)
    ptx_norm = _norm([_gradient(parameter) for parameter in parameters])
    ratio = _norm(ppo_gradients) / max(ptx_norm, 1e-12)
    gamma.asked.append(max(ratio * gamma.config.grad_norm_ratio, 1e-12))
    for parameter, ppo_gradient in zip(parameters, ppo_gradients, strict=True):
        _gradient(parameter).mul_(gamma.value).add_(ppo_gradient)
    return {"ptx/loss": loss, "ptx/gamma": gamma.value, "ptx/grad_ratio": gamma.value / max(ratio, 1e-12)}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = _gradient(parameter).clone()
    parameter.grad = None
    return gradient


def _norm(gradients: Sequence[Tensor]) -> float:
    norms = [whole(torch.linalg.vector_norm(each)) for each in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
