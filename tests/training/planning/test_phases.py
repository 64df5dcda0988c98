"""FLOPs are those that torch counts, and seconds are those that the formulas give by hand."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.training.planning.model_configs import MISTRAL, SMOLLM2, size_of
from training.config import TrainingConfig
from training.data.groups import Group, pack
from training.models.device import autocast
from training.models.policy import SharedLayers, UpperLayers, completion_logprobs
from training.planning.hardware import CPU_EFFICIENCY, GPU_EFFICIENCY, Hardware
from training.planning.model_size import read_model
from training.planning.phases import (
    FORWARD_SLOPE,
    Phase,
    layer_update_flops,
    plan_once,
    plan_round,
    sequences_at_once,
)
from training.planning.workload import Workload, assume

MACHINE = Hardware("a machine", bandwidth_gb_s=20.0, matmul_gflop_s=1000.0, memory_gib=16.0)
GROUPS = [Group((1, 5, 9, 300), ((7, 8, 2), (11, 12, 2))), Group((1, 40, 41, 42), ((200, 201, 2), (204, 205, 2)))]


# Of a prompt of 50 tokens and four completions of 40, in parts: 50² + 4 · 40 · 90 pairs.
CONTEXT = (2500 + 14400) / 210


def work_of(model: str = SMOLLM2, prompt: float = 50.0, completion: float = 40.0, **values: Any) -> Workload:
    return assume(TrainingConfig.model_validate(values), size_of(model), prompt, completion)


def phases(work: Workload, machine: Hardware = MACHINE) -> dict[str, Phase]:
    return {phase.name: phase for phase in (*plan_round(work, machine), *plan_once(work, machine))}


@pytest.mark.parametrize(
    ("rank", "checkpointing", "tolerance"),
    [
        pytest.param(0, False, 0.0, id="full weights"),
        # Nothing below the lowest adapters needs gradients.
        pytest.param(4, False, 0.07, id="adapters"),
        # A layer's last product is not computed again, because nothing needs it.
        pytest.param(0, True, 0.07, id="checkpointing"),
    ],
)
def test_flops_of_an_update_are_what_torch_counts(
    shared: SharedLayers, tiny_folder: Path, rank: int, checkpointing: bool, tolerance: float
) -> None:
    values = {"num_frozen_layers": 0, "lora": {"rank": rank}, "gradient_checkpointing": checkpointing}
    work = assume(TrainingConfig.model_validate({"ppo": values}), read_model(tiny_folder))
    packed = pack(GROUPS)
    policy, angles = UpperLayers(shared.model, 0, 2).trainable(work.config.ppo.lora), shared.angles(packed)
    policy.checkpointing = checkpointing
    hidden_GTD = shared.encode(packed, [0])[0]
    with FlopCounterMode(display=False) as counter:
        with autocast(hidden_GTD.device):
            normed_GTD = policy(hidden_GTD, packed, angles)
        completion_logprobs(normed_GTD, shared.head, packed).sum().backward()
    num_rows, row = packed.tokens_GT.shape
    predicted = FORWARD_SLOPE * work.model.head_flops(12)
    # Rows of a prompt of four tokens and two completions of three: 16 pairs, and 21 of each.
    expected = layer_update_flops(work, num_rows * row, (16 + 2 * 21) / row) + predicted
    assert counter.get_total_flops() == pytest.approx(expected, rel=tolerance)


def test_decoding_reads_all_weights_and_caches_at_each_step() -> None:
    work = work_of(ppo={"prompts_per_round": 8, "rollouts_per_prompt": 4, "max_tokens": 40}, max_num_seqs=16)
    found, model = phases(work)["rollouts"], work.model
    # 32 rollouts, 16 at a time, of 40 tokens after 50: 80 steps, at a mean context of 70.
    num_bytes = 80 * (2 * 134_515_008 + 16 * 70 * 2 * 2 * 30 * 3 * 64)
    drawn = 80 * 16 * (2 * (30 * model.layer_matrices + 576 * 49152) + 4 * 30 * 576 * 70)
    prefill = 8 * 50 * 30 * (2 * model.layer_matrices + 4 * 576 * 50)
    assert found.tokens == 1280
    assert found.bytes == pytest.approx(num_bytes)
    assert found.flops == pytest.approx(drawn + prefill)
    assert found.seconds == pytest.approx(
        max(num_bytes / 20e9, drawn / 1e12) / MACHINE.efficiency.decode + prefill / 1e12 / MACHINE.efficiency.scoring
    )


def test_one_rollout_is_bound_by_memory_and_many_by_matrix_products() -> None:
    def seconds(count: int, machine: Hardware) -> float:
        values = {"prompts_per_round": count, "rollouts_per_prompt": 1, "max_tokens": 40, "num_minibatches": 1}
        return phases(work_of(ppo=values, max_num_seqs=4096, kv_cache_mib=1 << 20), machine)["rollouts"].seconds

    reads_twice = Hardware("reads twice as fast", 40.0, 1000.0, 16.0)
    assert seconds(1, reads_twice) == pytest.approx(seconds(1, MACHINE) / 2, rel=0.05)
    assert seconds(1024, reads_twice) == seconds(1024, MACHINE)


def test_the_engine_draws_as_many_at_once_as_it_may_and_its_cache_holds() -> None:
    assert sequences_at_once(work_of(max_num_seqs=8), 100) == 8
    assert sequences_at_once(work_of(max_num_seqs=64), 3) == 3
    # 16 MiB at 23,040 bytes a token hold 8 sequences of 90 tokens.
    assert sequences_at_once(work_of(max_num_seqs=64, kv_cache_mib=16), 100) == pytest.approx(16 * 2**20 / 23040 / 90)


def test_scoring_runs_shared_layers_once_and_each_models_own() -> None:
    values = {"ppo": {"num_frozen_layers": 10}, "reward_model": {"num_layers": 20, "num_trained_layers": 3}}
    work = work_of(**values)
    found, model = phases(work)["scoring"], work.model
    # 20 shared; 20 of the policy and 20 of the reference; 3 of the reward model and 3 of the value model.
    layers = 20 + 20 + 20 + 3 + 3
    assert found.tokens == 16 * (50 + 4 * 40)
    # Logits of policy and reference, and the slopes of the first of four steps.
    assert found.flops == model.forward_flops(found.tokens, CONTEXT, layers) + 2.25 * model.head_flops(64 * 40)
    assert found.seconds == pytest.approx(found.flops / 1e12 / MACHINE.efficiency.scoring)


def test_phases_take_as_long_as_their_share_of_the_roof_allows() -> None:
    work = work_of(ppo={"ptx": {"data": "text.txt"}})
    on_cpu, on_gpu = (phases(work, replace(MACHINE, efficiency=each)) for each in (CPU_EFFICIENCY, GPU_EFFICIENCY))
    shares = {
        "scoring": "scoring",
        "update": "update",
        "pretraining mix": "pretraining",
        "reward model": "reward_model",
    }
    for name, field in shares.items():
        longer = getattr(CPU_EFFICIENCY, field) / getattr(GPU_EFFICIENCY, field)
        assert on_gpu[name].seconds == pytest.approx(on_cpu[name].seconds * longer)
    # Prompts are read at the share that scoring reaches.
    for name in ("rollouts", "evaluation"):
        longer = on_gpu[name].seconds / on_cpu[name].seconds
        assert CPU_EFFICIENCY.decode / GPU_EFFICIENCY.decode < longer < CPU_EFFICIENCY.scoring / GPU_EFFICIENCY.scoring


def test_an_update_runs_through_what_is_trained_and_then_moves_it() -> None:
    work = work_of(ppo={"num_epochs": 2, "num_minibatches": 4}, reward_model={"num_trained_layers": 3})
    found, model, tokens = phases(work)["update"], work.model, 16 * (50 + 4 * 40)
    once = 3 * model.weight_flops(tokens, 13) + 3.5 * model.attention_flops(tokens, CONTEXT, 13)
    once += 2 * model.head_flops(64 * 40)
    # A quarter of the first epoch has been computed by scoring, except the backward pass.
    there = model.forward_flops(tokens, CONTEXT, 10 + 3) + 2 * model.head_flops(64 * 40)
    assert found.flops == pytest.approx(2 * once - there / 4)
    # Eight steps of AdamW: four numbers read and three written, of policy and value model.
    trained = 13 * model.layer + model.norm + 2 * 576
    assert found.bytes == 8 * 7 * 4 * trained
    assert found.seconds == pytest.approx((found.flops / 1e12 + found.bytes / 20e9) / MACHINE.efficiency.update)


@pytest.mark.parametrize(
    "values", [{"micro_batch_tokens": 839}, {"gradient_checkpointing": True}], ids=["micro-batches", "checkpointing"]
)
def test_a_step_of_several_parts_or_with_checkpointing_computes_its_pass_itself(values: dict[str, object]) -> None:
    fits = work_of(ppo={"num_minibatches": 4, "micro_batch_tokens": 840})
    work = work_of(ppo={"num_minibatches": 4, "micro_batch_tokens": 840, **values})
    assert (fits.kept_share, work.kept_share) == (0.25, 0)
    assert phases(work)["update"].flops > phases(fits)["update"].flops


def test_held_out_prompts_are_answered_by_both_policies() -> None:
    ppo = {"prompts_per_round": 32, "rollouts_per_prompt": 3}
    work = work_of(num_evaluation_prompts=32, completions_per_evaluation_prompt=3, ppo=ppo)
    drawn, asked = phases(work)["rollouts"], phases(work)["evaluation"]
    once = (drawn.tokens, drawn.flops, drawn.bytes, drawn.seconds)
    assert (asked.tokens, asked.flops, asked.bytes, asked.seconds) == tuple(2 * each for each in once)


def test_the_pretraining_mix_costs_what_its_tokens_cost() -> None:
    mix = {"data": "text.txt", "examples_per_episode": 8, "sequence_tokens": 100}
    work = work_of(ppo={"ptx": mix, "num_frozen_layers": 12})
    found, model = phases(work)["pretraining mix"], work.model
    assert found.tokens == 8 * 64 * 100
    assert found.flops == pytest.approx(
        model.forward_flops(51200, 100, 12)
        + 3 * model.weight_flops(51200, 18)
        + 3.5 * model.attention_flops(51200, 100, 18)
        + 2 * model.head_flops(51200)
    )
    assert "pretraining mix" not in phases(work_of())


def test_the_reward_model_is_fitted_once_to_all_that_is_not_held_out() -> None:
    alone = work_of(reward_model={"max_rankings": 1000, "held_out_share": 0.4, "num_layers": 20})
    trained = work_of(
        reward_model={"max_rankings": 1000, "held_out_share": 0.4, "num_layers": 20, "num_trained_layers": 5}
    )
    rankings, row = 600 + 2 * 400, 50 + 4 * 40
    model = alone.model
    assert phases(alone)["reward model"].flops == pytest.approx(model.forward_flops(rankings * row, CONTEXT, 20))
    assert phases(trained)["reward model"].flops == pytest.approx(
        model.forward_flops(rankings * row, CONTEXT, 20)
        + 2 * model.weight_flops(600 * row, 5)
        + 2.5 * model.attention_flops(600 * row, CONTEXT, 5)
    )


ppo_values = st.fixed_dictionaries(
    {
        "prompts_per_round": st.integers(1, 64),
        "rollouts_per_prompt": st.integers(1, 9),
        "max_tokens": st.integers(1, 512),
        "num_epochs": st.integers(1, 4),
        "num_minibatches": st.just(1),
        "num_frozen_layers": st.integers(0, 30),
    }
)


@settings(max_examples=30)
@given(ppo_values, st.sampled_from([SMOLLM2, MISTRAL]), st.floats(1, 500), st.floats(1, 500))
def test_no_phase_beats_the_roof_and_more_work_takes_longer(
    values: dict[str, int], model: str, prompt: float, completion: float
) -> None:
    before = phases(work_of(model, prompt, completion, ppo=values))
    for phase in before.values():
        assert phase.seconds > 0
        assert phase.seconds >= max(phase.flops / 1e12, phase.bytes / 20e9) * (1 - 1e-9)
    for name in ("prompts_per_round", "rollouts_per_prompt", "num_epochs"):
        after = phases(work_of(model, prompt, completion, ppo={**values, name: values[name] + 1}))
        assert all(after[phase].seconds >= before[phase].seconds * (1 - 1e-9) for phase in before if phase != "scoring")
        # Where more rows keep fewer of their passes for the first step, scoring does less and the update more.
        assert _scored_and_updated(after) >= _scored_and_updated(before) * (1 - 1e-9)


def _scored_and_updated(phases: Mapping[str, Phase]) -> float:
    return phases["scoring"].seconds + phases["update"].seconds


@settings(max_examples=30)
@given(ppo_values, st.integers(2, 8))
def test_devices_share_the_work(values: dict[str, int], num_devices: int) -> None:
    many = Hardware("several", 20.0, 1000.0, 16.0, num_devices)
    alone, shared = phases(work_of(ppo=values)), phases(work_of(ppo=values), many)
    for name in ("scoring", "update"):
        assert shared[name].seconds == pytest.approx(alone[name].seconds / num_devices)
    # The first device does these alone.
    for name in ("reward model", "evaluation"):
        assert shared[name] == alone[name]
    # Each device reads all weights, so decoding gains less.
    assert alone["rollouts"].seconds / num_devices <= shared["rollouts"].seconds * (1 + 1e-9)
    assert shared["rollouts"].seconds <= alone["rollouts"].seconds * (1 + 1e-9)
