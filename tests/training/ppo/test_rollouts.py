"""The rollout engine, real vLLM on the tiny policy: what it draws, and that new weights are the ones it draws from."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from policies.precision import compute_dtype
from training.config import LoraConfig
from training.data.groups import Group, pack
from training.models.device import autocast
from training.models.policy import (
    SharedLayers,
    UpperLayers,
    completion_logprobs,
    load_model,
    merged_tensors,
    upper_layers_of,
)
from training.models.tensor_file import load_weights
from training.ppo.rollouts import Request, Rollout, RolloutEngine

# vLLM walks over all of torch's modules as it starts, deprecated names and all.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

# Several, of which the random policy draws some.
ENDS = tuple(range(2, 12))
# Longer than a block of the KV cache on a CPU, 32 tokens, and nearly all shared: what the prefix cache is for.
PROMPTS = [(1, *range(60, 100), 50 + i, 90, 17, 33 + i) for i in range(6)]
# A bf16 logit of size 4 is known to 2^-7; two engines add up what differs on the way.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[RolloutEngine]:
    beats: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("feedback.heartbeat.beat", lambda: beats.append(None))
        made = RolloutEngine(
            tiny_folder, max_model_len=128, max_num_seqs=32, kv_cache_mib=64, end_token_ids=ENDS, seed=0
        )
    assert len(beats) >= len(load_weights(tiny_folder)), "it shows progress while it reads weights"
    yield made


@pytest.fixture
def weights(tiny_folder: Path) -> dict[str, Tensor]:
    return load_weights(tiny_folder)


def draw(engine: RolloutEngine, weights: Mapping[str, Tensor], seed: int) -> list[list[Rollout]]:
    return engine.draw(Request(weights.items(), PROMPTS, num_completions=4, max_tokens=16, seed=seed))


def recomputed(shared: SharedLayers, upper: UpperLayers, drawn: list[list[Rollout]]) -> tuple[Tensor, Tensor]:
    groups = [Group(p, tuple(r.token_ids for r in rollouts)) for p, rollouts in zip(PROMPTS, drawn, strict=True)]
    packed = pack(groups).to(shared.device)
    hidden_GTD = shared.encode(packed, [upper.first])[upper.first]
    with torch.no_grad(), autocast(shared.device):
        hidden_GTD = upper(hidden_GTD, packed, shared.angles(packed))
    logprobs_NC = completion_logprobs(hidden_GTD, shared.head, packed)
    sampled_M = torch.tensor([lp for rollouts in drawn for rollout in rollouts for lp in rollout.logprobs])
    return logprobs_NC[packed.mask_NC].cpu(), sampled_M


def test_draws_k_completions_that_end_with_an_end_token_or_at_the_limit(
    engine: RolloutEngine, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[None] = []
    monkeypatch.setattr("feedback.heartbeat.beat", lambda: beats.append(None))
    drawn = draw(engine, weights, seed=0)
    # All tokens come from one call, which shows its progress from within.
    assert len(beats) >= max(len(rollout.token_ids) for rollouts in drawn for rollout in rollouts)
    assert [len(rollouts) for rollouts in drawn] == [4] * len(PROMPTS)
    for rollout in (rollout for rollouts in drawn for rollout in rollouts):
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert not set(ENDS) & set(rollout.token_ids[:-1])
        assert rollout.finished == (rollout.token_ids[-1] in ENDS)
        assert rollout.finished or len(rollout.token_ids) == 16
    ended_by = {rollout.token_ids[-1] for rollouts in drawn for rollout in rollouts if rollout.finished}
    assert len(ended_by) > 1, "any of the end tokens ends a completion"
    assert len({rollout.token_ids for rollout in drawn[0]}) > 1


def test_prompts_share_no_noise(engine: RolloutEngine, weights: dict[str, Tensor]) -> None:
    drawn = engine.draw(Request(weights.items(), [PROMPTS[0]] * 4, num_completions=3, max_tokens=16, seed=0))
    assert len({rollout.token_ids for rollouts in drawn for rollout in rollouts}) == 12


def test_the_same_seed_draws_the_same(engine: RolloutEngine, weights: dict[str, Tensor]) -> None:
    first, again, other = (draw(engine, weights, seed=seed) for seed in (1, 1, 2))
    tokens = [[[r.token_ids for r in rollouts] for rollouts in drawn] for drawn in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_new_weights_are_drawn_from_at_once_and_agree_with_the_trainer(
    engine: RolloutEngine, tiny_folder: Path, weights: dict[str, Tensor], shared: SharedLayers
) -> None:
    reference = UpperLayers(load_model(tiny_folder), 1, shared.num_layers)
    draw(engine, weights, seed=3)  # Fills the prefix cache with the old weights' keys and values.
    changed = upper_layers_of(tiny_folder, shared, 1, LoraConfig())
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    drawn = draw(engine, dict(merged_tensors(shared, changed, compute_dtype(shared.device))), seed=3)
    own_M, sampled_M = recomputed(shared, changed, drawn)
    assert float((own_M - sampled_M).abs().mean()) < TOLERANCE
    old_M, _ = recomputed(shared, reference, drawn)
    assert float((old_M - sampled_M).abs().mean()) > 2 * TOLERANCE

    drawn = draw(engine, weights, seed=3)
    own_M, sampled_M = recomputed(shared, reference, drawn)
    assert float((own_M - sampled_M).abs().mean()) < TOLERANCE
