"""Draws from a policy by torch alone, slowly and obviously, where a test needs no engine."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.models.policy import load_model
from training.ppo.rollouts import Rollout


class PlainSampler:
    """Samples at temperature 1 from weights that can be replaced, as the rollout engine does."""

    def __init__(self, folder: Path, num_completions: int, max_tokens: int, eos_token_id: int) -> None:
        self.model = load_model(folder)
        self.num_completions, self.max_tokens, self.eos_token_id = num_completions, max_tokens, eos_token_id
        self.num_loads = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model.load_state_dict(dict(weights), strict=False)
        self.num_loads += 1

    def sample(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[Rollout]]:
        generator = torch.Generator().manual_seed(seed)
        return [[self._draw(list(prompt), generator) for _ in range(self.num_completions)] for prompt in prompts]

    @torch.no_grad()
    def _draw(self, prompt: list[int], generator: torch.Generator) -> Rollout:
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < self.max_tokens and (not tokens or tokens[-1] != self.eos_token_id):
            read_BT = torch.tensor([prompt + tokens], device=self.model.device)
            logprobs_V = self.model(read_BT).logits[0, -1].float().log_softmax(-1).cpu()
            tokens.append(int(torch.multinomial(logprobs_V.exp(), 1, generator=generator)))
            logprobs.append(float(logprobs_V[tokens[-1]]))
        return Rollout(tuple(tokens), tuple(logprobs), tokens[-1] == self.eos_token_id)
