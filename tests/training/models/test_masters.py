"""Weights in fp32 move by steps of any size, and what models compute with follows them on average."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.training.learning import PPO, PROMPTS, fitted, hooks_of, learner_of, request_of
from training.models import masters
from training.models.policy import SharedLayers, load_model
from training.ppo.experience import gather
from training.ppo.gradients import accumulate_gradients

CPU = torch.device("cpu")


@given(st.floats(-(2.0**40), 2.0**40, width=32), st.integers(0, 1000))
def test_a_number_is_rounded_to_one_of_its_neighbours(value: float, seed: int) -> None:
    exact = torch.full((64,), value)
    found = masters.rounded(exact, masters.noise_source(CPU, seed)).float()
    towards_zero = (exact.view(torch.int32) >> 16 << 16).view(torch.float32)
    away_from_zero = ((exact.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    assert torch.all((found == towards_zero) | (found == away_from_zero))
    if towards_zero[0] == value:
        assert torch.equal(found, exact)


@pytest.mark.parametrize("value", [1.001, -1.001, 0.2503, 3e-4])
def test_it_is_right_on_average(value: float) -> None:
    found = masters.rounded(torch.full((100_000,), value), masters.noise_source(CPU, 1)).float()
    # 1.001 is 1 in three cases of four, and the next number, 1.0078, in the others.
    assert len(found.unique()) == 2
    spacing = float(found.unique().diff())
    assert float(found.mean()) == pytest.approx(value, abs=4 * spacing / 2 / 100_000**0.5)
    assert float(torch.tensor(value).bfloat16()) != pytest.approx(value, abs=4 * spacing / 2 / 100_000**0.5)


def test_gradients_of_a_minibatchs_parts_add_up_in_fp32() -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    masters.keep_masters(layer)
    (weight,) = masters.trained(layer).values()
    for part in (1.0, *[2.0**-9] * 8):
        layer(torch.full((1, 1), part, dtype=torch.bfloat16)).sum().backward()
    # In bf16, 1 + 2⁻⁹ is 1.
    assert weight.grad is not None
    assert float(weight.grad) == 1 + 8 * 2.0**-9
    assert layer.weight.grad is None
    masters.drop_masters(layer)
    assert [*masters.trained(layer).values()] == [layer.weight]
    layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert float(weight.grad) == 1 + 8 * 2.0**-9


def fall_of_the_loss(folder: Path, *, stochastic_rounding: bool) -> float:
    """Returns by how much four small steps on one round's rollouts lower the policy's loss."""
    config = PPO.model_copy(
        update={"learning_rate": 1e-5, "num_minibatches": 1, "stochastic_rounding": stochastic_rounding}
    )
    learner = learner_of(SharedLayers(load_model(folder)), folder, config, fitted(SharedLayers(load_model(folder))))
    _, sampler = hooks_of(folder, config)
    rows = list(zip(PROMPTS, sampler.draw(request_of(config, 1)), strict=True))
    (minibatch,), _ = gather(learner, config, rows, config.kl_coef, seed=3)
    losses = []
    for group in learner.optimizer.param_groups:
        group["lr"] = config.learning_rate
    for step in range(5):
        masters.cast(learner.policy, step)
        learner.optimizer.zero_grad()
        losses.append(accumulate_gradients(learner, config, minibatch)["policy/loss"])
        learner.optimizer.step()
    return losses[0] - losses[-1]


def test_in_bf16_small_steps_count_as_they_do_in_fp32(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", lambda: True)
    to_the_nearest = fall_of_the_loss(tiny_folder, stochastic_rounding=False)
    at_random = fall_of_the_loss(tiny_folder, stochastic_rounding=True)
    monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", lambda: False)
    in_fp32 = fall_of_the_loss(tiny_folder, stochastic_rounding=True)
    assert at_random == pytest.approx(in_fp32, rel=0.3)
    assert to_the_nearest < in_fp32 / 2
