"""Draws from a policy by torch alone, slowly and obviously, where a test needs no engine."""

from pathlib import Path

import torch

from training.models.policy import load_model
from training.ppo.rollouts import Request, Rollout


class PlainSampler:
    """Samples at temperature 1 from weights that can be replaced, as the rollout engine does."""

    def __init__(self, folder: Path, eos_token_id: int) -> None:
        self.model = load_model(folder)
        self.eos_token_id = eos_token_id
        self.num_draws = 0

    def draw(self, request: Request) -> list[list[Rollout]]:
        """Draws from the request's weights; from those of the request before if it has none."""
        self.model.load_state_dict(dict(request.weights), strict=False)
        self.num_draws += 1
        generator = torch.Generator().manual_seed(request.seed)
        return [
            [self._draw_one(list(prompt), request.max_tokens, generator) for _ in range(request.num_completions)]
            for prompt in request.prompts
        ]

    @torch.no_grad()
    def _draw_one(self, prompt: list[int], max_tokens: int, generator: torch.Generator) -> Rollout:
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < max_tokens and (not tokens or tokens[-1] != self.eos_token_id):
            read_BT = torch.tensor([prompt + tokens], device=self.model.device)
            logprobs_V = self.model(read_BT).logits[0, -1].float().log_softmax(-1).cpu()
            tokens.append(int(torch.multinomial(logprobs_V.exp(), 1, generator=generator)))
            logprobs.append(float(logprobs_V[tokens[-1]]))
        return Rollout(tuple(tokens), tuple(logprobs), tokens[-1] == self.eos_token_id)
