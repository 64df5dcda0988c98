"""A laboratory for learning: one engine on SmolLM2, simulated labelers over a hidden utility, and their rankings.

Everything except the labelers is alignd's own: rollouts, rankings in groups, reward model, PPO. What is drawn depends
only on the seed of the experiment.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignd.v1 import types_pb2
from bench.learning.hh_rlhf import Message
from deploy.simulation.labelers import Labeler, calibrate_temperature, make_labelers
from deploy.simulation.utility import Utility, measure
from policies.rendering import prompt_token_ids
from training.data.groups import Group, RankedExample
from training.models.tensor_file import load_weights
from training.ppo.rollouts import Request, Rollout, RolloutEngine

_SYSTEM_PROMPT = "You are a helpful assistant. Answer briefly, in one or two sentences."
_NUM_LABELERS = 40  # about as many as InstructGPT's contractors
_ROLES = {"user": types_pb2.ROLE_USER, "assistant": types_pb2.ROLE_ASSISTANT}
_CALIBRATION_K = 4
# Completions that are drawn at a time take seeds in a row. Draws with other salts, or of other seeds, share none.
_SALTED_SEEDS, _SEEDS = 10_007, 1_000_000_007


@dataclass(frozen=True)
class Asked:
    """A prompt as people wrote it, and in tokens."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Completions of a prompt, in tokens: what a user is asked to rank."""

    asked: Asked
    group: Group


@dataclass
class Lab:
    """What the experiments share."""

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    base: Path
    utility: Utility
    max_tokens: int
    seed: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Those of the policy that completions are drawn from."""

    def ask(self, prompts: Sequence[str], shots: Sequence[Message] = ()) -> list[Asked]:
        """Renders prompts as the demo's application does, after `shots` if there are any."""
        return [Asked(text, self._tokens(text, shots)) for text in prompts]

    def _tokens(self, text: str, shots: Sequence[Message]) -> tuple[int, ...]:
        messages = [types_pb2.Message(role=types_pb2.ROLE_SYSTEM, content=_SYSTEM_PROMPT)]
        messages += [types_pb2.Message(role=_ROLES[shot.role], content=shot.text) for shot in shots]
        messages.append(types_pb2.Message(role=types_pb2.ROLE_USER, content=text))
        return tuple(prompt_token_ids(self.tokenizer, types_pb2.Prompt(chat=types_pb2.Chat(messages=messages))))

    def load(self, folder: Path) -> None:
        """Draws from the policy in this folder from now on."""
        self.weights = load_weights(folder)

    def draw(self, asked: Sequence[Asked], num_completions: int, salt: int) -> list[list[Rollout]]:
        """Returns completions of each prompt by the policy that is loaded."""
        return self.engine.draw(
            Request(
                self.weights.items(),
                [each.token_ids for each in asked],
                num_completions,
                self.max_tokens,
                self.seed * _SEEDS + salt * _SALTED_SEEDS,
            )
        )

    def text(self, token_ids: Sequence[int]) -> str:
        """Returns what a user would read."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def utilities(self, asked: Sequence[Asked], drawn: Sequence[Sequence[Rollout]]) -> list[list[float]]:
        """Returns the hidden utility of each completion."""
        return [
            measure(self.utility, each.text, [self.text(rollout.token_ids) for rollout in rollouts])
            for each, rollouts in zip(asked, drawn, strict=True)
        ]

    def labelers(self, asked: Sequence[Asked]) -> list[Labeler]:
        """Returns labelers who agree on 72.6 % of comparisons of what the loaded policy writes."""
        drawn = self.draw(asked, _CALIBRATION_K, salt=1)
        temperature = calibrate_temperature(self.utilities(asked, drawn))
        return make_labelers(_NUM_LABELERS, self.seed, temperature)

    def sample(self, asked: Sequence[Asked], ks: range, salt: int) -> list[Sample]:
        """Returns K completions of each prompt by the loaded policy, K drawn from `ks`, as a user would rank them."""
        drawn_by = random.Random(self.seed * 7919 + salt)
        sizes = [drawn_by.choice(ks) for _ in asked]
        samples: dict[int, Sample] = {}
        for k in sorted(set(sizes)):
            indices = [index for index, size in enumerate(sizes) if size == k]
            chosen = [asked[index] for index in indices]
            drawn = self.draw(chosen, k, salt + k)
            for index, each, rollouts in zip(indices, chosen, drawn, strict=True):
                samples[index] = Sample(each, Group(each.token_ids, tuple(rollout.token_ids for rollout in rollouts)))
        return [samples[index] for index in range(len(asked))]

    def judge(self, samples: Sequence[Sample], labelers: Sequence[Labeler], first_seq: int = 0) -> list[RankedExample]:
        """Returns one ranking of each sample, by one labeler; they take turns."""
        examples = []
        for seq, sample in enumerate(samples, first_seq):
            labeler = labelers[seq % len(labelers)]
            texts = [self.text(tokens) for tokens in sample.group.completions]
            groups = labeler.rank(sample.asked.text, texts, measure(self.utility, sample.asked.text, texts))
            ranks = {member: rank for rank, group in enumerate(groups) for member in group}
            in_order = tuple(ranks[i] for i in range(len(texts)))
            examples.append(RankedExample(sample.group, in_order, labeler.user_id, seq))
        return examples

    def rank(
        self, asked: Sequence[Asked], labelers: Sequence[Labeler], ks: range, salt: int, first_seq: int = 0
    ) -> list[RankedExample]:
        """Returns one ranking of each prompt, by one labeler: of K completions by the loaded policy, K from `ks`."""
        return self.judge(self.sample(asked, ks, salt), labelers, first_seq)
