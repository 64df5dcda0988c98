"""A plan counts every parameter once, adds its phases up, and warns by the name of a field."""

from typing import Any

import pytest

from tests.training.planning.model_configs import MISTRAL, QWEN, SMOLLM2, size_of
from training.config import TrainingConfig
from training.planning.hardware import Hardware
from training.planning.plan import Plan, make_plan
from training.recipes import load_recipe

LARGE = Hardware("large", bandwidth_gb_s=30.0, matmul_gflop_s=4000.0, memory_gib=64.0)
H100 = Hardware("NVIDIA H100", bandwidth_gb_s=3350.0, matmul_gflop_s=989e3, memory_gib=79.1)
EIGHT_H100 = Hardware("NVIDIA H100", bandwidth_gb_s=3350.0, matmul_gflop_s=989e3, memory_gib=79.1, num_devices=8)


def plan_of(machine: Hardware = LARGE, model: str = SMOLLM2, **values: Any) -> Plan:
    return make_plan(TrainingConfig.model_validate(values), size_of(model), machine)


@pytest.mark.parametrize("model", [SMOLLM2, MISTRAL], ids=str)
@pytest.mark.parametrize("frozen", [0, 7, 99])
def test_the_policys_parts_are_the_whole_model(model: str, frozen: int) -> None:
    plan = plan_of(model=model, ppo={"num_frozen_layers": frozen})
    parts = [part for part in plan.parameters if part.name not in ("reward model", "value model")]
    assert sum(part.trained + part.frozen for part in parts) == size_of(model).total
    assert sum(part.trained for part in parts) == plan.work.policy_parameters


def test_adapters_are_trained_on_a_policy_that_is_not() -> None:
    plan = plan_of(ppo={"num_frozen_layers": 20, "lora": {"rank": 8}})
    trained = {part.name: part.trained for part in plan.parameters if part.trained}
    # Ten layers: four matrices of attention, with 192 wide keys and values, and three of the MLP.
    widths = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    assert trained == {"adapters of rank 8": 8 * 10 * widths, "value model": 2 * 576}


def test_a_run_is_its_rounds_and_what_is_done_once() -> None:
    short, long = plan_of(ppo={"num_rounds": 1}), plan_of(ppo={"num_rounds": 11})
    assert long.round == short.round
    assert long.run_seconds - short.run_seconds == pytest.approx(10 * short.round_seconds)
    assert long.run_flops - short.run_flops == pytest.approx(10 * sum(each.flops for each in short.round))
    assert short.run_seconds - short.round_seconds == pytest.approx(sum(each.seconds for each in short.once))


def test_lengths_are_assumed_unless_they_are_given() -> None:
    assumed = plan_of(ppo={"max_prompt_tokens": 200, "max_tokens": 40}).work
    assert (assumed.prompt_tokens, assumed.completion_tokens) == (50, 30)
    given = make_plan(TrainingConfig(), size_of(SMOLLM2), LARGE, prompt_tokens=11, completion_tokens=22).work
    assert (given.prompt_tokens, given.completion_tokens) == (11, 22)


def test_the_defaults_have_nothing_to_warn_of() -> None:
    assert plan_of().warnings == ()


def test_what_does_not_fit_names_the_fields_that_help_most() -> None:
    small = Hardware("small", 30.0, 4000.0, memory_gib=1.0)
    (warning,) = plan_of(small).warnings
    assert warning.startswith("memory: 2.8 GiB of 1.0 GiB at its fullest (update) does not fit")
    assert warning.endswith("ppo.micro_batch_tokens or ppo.gradient_checkpointing, kv_cache_mib, "
                            "ppo.num_frozen_layers or ppo.lora.rank")  # fmt: skip
    (checkpointed,) = plan_of(small, ppo={"gradient_checkpointing": True}, kv_cache_mib=4096).warnings
    assert "help most: kv_cache_mib" in checkpointed
    tight = Hardware("tight", 30.0, 4000.0, memory_gib=plan_of().memory.peak / 2**30 / 0.95)
    assert "leaves less than a tenth free" in plan_of(tight).warnings[0]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"ppo": {"num_frozen_layers": 30}}, "ppo.num_frozen_layers: the model has 30 layers"),
        ({"reward_model": {"num_layers": 31}}, "reward_model.num_layers: the model has 30 layers"),
        ({"ppo": {"ptx": {"gamma": 27.8}}}, "ppo.ptx.data: it is empty"),
        ({"kv_cache_mib": 64}, "kv_cache_mib: 64 MiB have room for 9 of the 64 rollouts"),
        (
            {"ppo": {"micro_batch_tokens": 511}},
            "ppo.micro_batch_tokens: a prompt with its rollouts may have 512",
        ),
        ({"ppo": {"learning_rate": 1e-6}}, "ppo.learning_rate: all steps together move a weight by 8.1e-05 at most"),
        ({"ppo": {"max_tokens": 8000}}, "ppo.max_tokens: a prompt and its rollout may have 8256 tokens"),
    ],
)
def test_each_warning_names_its_field(values: dict[str, Any], says: str) -> None:
    assert [warning for warning in plan_of(**values).warnings if warning.startswith(says)]


def test_a_larger_cache_of_the_size_that_was_asked_for_holds_all() -> None:
    (warning,) = plan_of(kv_cache_mib=64).warnings
    wanted = int(warning.split("; ")[1].split()[0])
    assert plan_of(kv_cache_mib=wanted).warnings == ()
    assert plan_of(kv_cache_mib=wanted - 1).warnings != ()


def test_a_plan_takes_as_many_devices_as_there_are_processes() -> None:
    assert plan_of(EIGHT_H100).hardware.num_devices == 1
    several = plan_of(EIGHT_H100, num_processes=4)
    assert several.hardware.num_devices == 4
    assert several.warnings == ()
    assert several.round_seconds < plan_of(EIGHT_H100).round_seconds
    (warning,) = plan_of(num_processes=2).warnings
    assert warning.startswith("num_processes: 2 processes need a device each, and the number of devices here is 1")


@pytest.mark.parametrize(
    ("recipe", "model", "machine"),
    [("smollm2", SMOLLM2, LARGE), ("gpu-1.3b", QWEN, H100), ("fsdp-8gpu", MISTRAL, EIGHT_H100)],
)
def test_each_recipe_fits_the_machine_that_it_is_meant_for(recipe: str, model: str, machine: Hardware) -> None:
    assert make_plan(load_recipe(recipe), size_of(model), machine).warnings == ()
