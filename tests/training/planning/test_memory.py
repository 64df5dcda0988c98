"""Predicted bytes are those that torch allocates for the tiny model, and grow with the settings that they depend on."""

import itertools
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.training.models.families import SUPPORTED, make_family
from tests.training.planning.model_configs import QWEN, SMOLLM2, size_of
from training.config import LoraConfig, TrainingConfig
from training.data.groups import Group, pack
from training.models.device import autocast, copy_dtype
from training.models.logprobs import CHUNK_TOKENS, Head, label_logprobs_and_entropy
from training.models.masters import trained
from training.models.policy import SharedLayers, UpperLayers, completion_logprobs, load_model
from training.models.reward import RewardModel
from training.planning.memory import (
    MOMENTS,
    Memory,
    activation_bytes,
    last_norm_bytes,
    logit_bytes,
    plan_memory,
    round_bytes,
)
from training.planning.model_size import read_model
from training.planning.workload import Workload, assume
from training.ppo.experience import gather
from training.ppo.learner import make_learner
from training.ppo.rollouts import Rollout

# Of one length, so that nothing is padded, and long enough for activations to outweigh everything else.
PROMPT, COMPLETION = tuple(range(3, 35)), tuple(range(40, 64))
CONFIG = TrainingConfig.model_validate(
    {
        "reward_model": {"num_layers": 2, "num_trained_layers": 1},
        "ppo": {
            "prompts_per_round": 4, "rollouts_per_prompt": 3, "max_prompt_tokens": 32, "max_tokens": 24,
            "num_frozen_layers": 1, "num_minibatches": 2, "micro_batch_tokens": 2 * 104,
        },
    }
)  # fmt: skip


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors created inside: how many are alive now, and how many were at most."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in before}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, place: int) -> None:
        self.live -= self._sizes.pop(place)


@pytest.fixture(params=[2, 4], ids=["bf16", "fp32"])
def number_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Makes training compute in either precision, whichever this machine would choose."""
    in_bf16 = request.param == 2
    monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", lambda: in_bf16)
    return int(request.param)


def tiny_work(tiny_folder: Path, config: TrainingConfig = CONFIG, number_bytes: int = 2) -> Workload:
    return assume(config, read_model(tiny_folder), len(PROMPT), len(COMPLETION), number_bytes)


def part(memory: Memory, name: str) -> float:
    (found,) = [each for each in memory.parts if each.name == name]
    return found.bytes


@pytest.mark.parametrize("stochastic_rounding", [True, False])
@pytest.mark.parametrize("frozen", [0, 1])
def test_trained_weights_gradients_and_moments_are_what_torch_allocates(
    number_bytes: int, shared: SharedLayers, tiny_folder: Path, frozen: int, stochastic_rounding: bool
) -> None:
    config = TrainingConfig.model_validate(
        {"ppo": {"num_frozen_layers": frozen, "stochastic_rounding": stochastic_rounding}}
    )
    memory = plan_memory(tiny_work(tiny_folder, config, number_bytes))
    dtype = copy_dtype(shared.device, stochastic_rounding=stochastic_rounding)
    policy = UpperLayers(shared.model, frozen, shared.num_layers).trainable(LoraConfig(), dtype=dtype)
    weights = [*trained(policy).values()]
    optimizer = torch.optim.AdamW(weights)
    for parameter in policy.parameters():
        parameter.sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert part(memory, "policy: trained weights, fp32") == sum(each.nbytes for each in weights)
    copies = {*policy.parameters()} - {*weights}
    assert part(memory, "policy: their copies") == sum(each.nbytes for each in copies)
    assert all(each.grad is None for each in copies)
    assert part(memory, "policy: gradients, fp32") == sum(each.grad.nbytes for each in weights if each.grad is not None)
    assert part(memory, "policy: Adam's moments, fp32") == sum(each.nbytes for each in moments)


def test_adapters_have_as_many_parameters_as_peft_gives_them(
    number_bytes: int, shared: SharedLayers, tiny_folder: Path
) -> None:
    config = TrainingConfig.model_validate({"ppo": {"num_frozen_layers": 1, "lora": {"rank": 3}}})
    policy = UpperLayers(shared.model, 1, 2).trainable(config.ppo.lora)
    adapters = [each for each in policy.parameters() if each.requires_grad]
    work = tiny_work(tiny_folder, config, number_bytes)
    assert work.policy_parameters == sum(each.numel() for each in adapters)
    assert part(plan_memory(work), "policy under its adapters") == sum(
        each.nbytes for each in policy.parameters() if not each.requires_grad
    )


def test_frozen_weights_are_what_the_models_hold(number_bytes: int, shared: SharedLayers, tiny_folder: Path) -> None:
    memory = plan_memory(tiny_work(tiny_folder, number_bytes=number_bytes))
    assert part(memory, "reference") == sum(each.nbytes for each in shared.model.parameters())
    upper = UpperLayers(shared.model, 1, 2)
    assert part(memory, "reference: its upper layers again") == 0
    of_two = plan_memory(tiny_work(tiny_folder, number_bytes=number_bytes), num_devices=2)
    assert 2 * part(of_two, "reference: its upper layers again") == sum(each.nbytes for each in upper.parameters())
    own = RewardModel(shared, CONFIG.reward_model).layers
    assert part(memory, "reward model: own layers") == sum(each.nbytes for each in own.parameters())


def learner_of(shared: SharedLayers, config: TrainingConfig) -> Any:
    rewards, held_out_model = (
        RewardModel(shared, config.reward_model.model_copy(update={"num_trained_layers": layers})) for layers in (1, 0)
    )
    dtype = copy_dtype(shared.device, stochastic_rounding=config.ppo.stochastic_rounding)
    upper = UpperLayers(shared.model, config.ppo.num_frozen_layers, shared.num_layers)
    policy = upper.trainable(config.ppo.lora, dtype=dtype)
    return make_learner(policy, rewards, held_out_model, config.ppo)


def test_rollouts_of_a_round_take_what_is_planned(number_bytes: int, shared: SharedLayers, tiny_folder: Path) -> None:
    learner, work = learner_of(shared, CONFIG), tiny_work(tiny_folder, number_bytes=number_bytes)
    weights = trained(learner.value).values()
    assert part(plan_memory(work), "value model: weights, fp32") == sum(each.nbytes for each in weights)
    copies = {each for each in learner.value.parameters() if each.requires_grad} - {*weights}
    assert part(plan_memory(work), "value model: their copies") == sum(each.nbytes for each in copies)
    modules = (
        shared.model,
        learner.reference,
        learner.policy,
        learner.value,
        learner.reward_model,
        learner.held_out_model,
    )
    held = itertools.chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    rollout = Rollout(COMPLETION, (-1.0,) * len(COMPLETION), finished=True)
    with Allocations(held) as allocations:
        minibatches, outputs = gather(learner, CONFIG.ppo, [(PROMPT, [rollout] * 3)] * 4, 0.1, 0)
        assert outputs is not None
        held_for_the_first_step = allocations.live
        del outputs
    assert len(minibatches) == 2
    assert allocations.live == pytest.approx(round_bytes(work), rel=0.03)
    # What the first step learns from is kept since scoring, and is no more than any step's own.
    memory = plan_memory(work)
    names = ("policy: activations", "value model: activations", "trained weights, cast to bf16", "rollouts of a round")
    of_a_step = sum(part(memory, name) for name in names)
    assert held_for_the_first_step == pytest.approx(of_a_step, rel=0.1)
    assert allocations.peak < 1.05 * (of_a_step + part(memory, "logits of a chunk"))


@pytest.mark.parametrize(
    ("checkpointing", "rank", "copies", "tolerances"),
    [
        # By the bytes of a number. In fp32 the states gathered for the logits and the gradients of attention, which are
        # not counted, weigh more beside this small vocabulary.
        pytest.param(False, 0, False, {2: 0.03, 4: 0.05}, id="full weights"),
        pytest.param(False, 0, True, {2: 0.03, 4: 0.05}, id="copies of full weights"),
        # peft casts what enters each adapter once more, which is not counted.
        pytest.param(False, 4, False, {2: 0.20, 4: 0.15}, id="adapters"),
        pytest.param(False, 4, True, {2: 0.20, 4: 0.15}, id="copies of adapters"),
        pytest.param(True, 0, False, {2: 0.12, 4: 0.15}, id="checkpointing"),
        pytest.param(True, 0, True, {2: 0.12, 4: 0.15}, id="checkpointing with copies"),
    ],
)
def test_activations_and_logits_peak_where_planned(
    number_bytes: int,
    shared: SharedLayers,
    tiny_folder: Path,
    checkpointing: bool,
    rank: int,
    copies: bool,
    tolerances: Mapping[int, float],
) -> None:
    work, tolerance = tiny_work(tiny_folder, number_bytes=number_bytes), tolerances[number_bytes]
    packed = pack([Group(PROMPT * 4, (COMPLETION * 2, COMPLETION * 2))] * 4)
    angles, hidden_GTD = shared.angles(packed), shared.encode(packed, [0])[0]
    dtype = copy_dtype(shared.device, stochastic_rounding=copies)
    policy = UpperLayers(shared.model, 0, 2).trainable(LoraConfig(rank=rank), dtype=dtype)
    policy.checkpointing = checkpointing
    tokens, row, predicted = packed.tokens_GT.numel(), packed.tokens_GT.shape[1], int(packed.mask_NC.sum())
    rotations = [each for each in tree_iter(angles.arguments) if isinstance(each, Tensor)]
    with Allocations([*shared.model.parameters(), *policy.parameters(), hidden_GTD, *rotations]) as allocations:
        with autocast(hidden_GTD.device):
            normed_GTD = policy(hidden_GTD, packed, angles)
        loss = completion_logprobs(normed_GTD, shared.head, packed).sum()
        kept = allocations.live
        loss.backward()
    activations = activation_bytes(work, 2, tokens, row, checkpointing=checkpointing, adapters=rank > 0, copies=copies)
    # Slopes are of predicted tokens alone.
    last = last_norm_bytes(work, tokens) - 4 * (tokens - predicted) * work.model.hidden
    cast = 0 if rank or copies or number_bytes == 4 else 2 * sum(each.numel() for each in policy.parameters())
    if checkpointing:
        # Logits are gone by the time that a layer is computed again, with the bf16 weights of that layer alone.
        assert kept < 0.5 * allocations.peak
        assert allocations.peak == pytest.approx(activations + last + cast / 2, rel=tolerance)
    else:
        assert kept == pytest.approx(activations + last + cast, rel=tolerance)
        logits = logit_bytes(work, predicted)
        assert allocations.peak == pytest.approx(activations + last + cast + logits, rel=tolerance)


def test_entropy_beside_slopes_takes_no_more_logits_than_planned(tiny_folder: Path) -> None:
    work, num_tokens = tiny_work(tiny_folder, number_bytes=4), 2 * CHUNK_TOKENS
    hidden_MD = torch.randn(num_tokens, work.model.hidden, requires_grad=True)
    head, labels_M = Head(torch.randn(work.model.vocabulary, work.model.hidden)), torch.zeros(num_tokens, dtype=int)
    with Allocations([hidden_MD, head.weight_VD, labels_M]) as allocations:
        label_logprobs_and_entropy(hidden_MD, head, labels_M)
    slopes = 3 * hidden_MD.nbytes
    assert allocations.peak < logit_bytes(work, num_tokens) + slopes
    assert slopes < logit_bytes(work, num_tokens) / 2, "a third tensor of logits would not be hidden"


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral", "qwen3"])
def test_layers_of_other_families_keep_no_more_than_planned(number_bytes: int, tmp_path: Path, family: str) -> None:
    """They have more norms than Llama's, whose casts are planned as Llama's, and soft caps."""
    folder = make_family(family, SUPPORTED[family], tmp_path)
    shared, work = SharedLayers(load_model(folder)), tiny_work(folder, number_bytes=number_bytes)
    packed = pack([Group(tuple(range(40)), (tuple(range(40)), tuple(range(40))))] * 4)
    angles, hidden_GTD = shared.angles(packed), shared.encode(packed, [0])[0]
    policy = UpperLayers(shared.model, 0, shared.num_layers).trainable(LoraConfig())
    rotations = [each for each in tree_iter(angles.arguments) if isinstance(each, Tensor)]
    with Allocations([*shared.model.parameters(), *policy.parameters(), hidden_GTD, *rotations]) as allocations:
        with autocast(hidden_GTD.device):
            normed_GTD = policy(hidden_GTD, packed, angles)
        loss = completion_logprobs(normed_GTD, shared.head, packed).sum()
        kept = allocations.live
        loss.backward()
    tokens = packed.tokens_GT.numel()
    planned = activation_bytes(work, shared.num_layers, tokens, packed.tokens_GT.shape[1])
    planned += last_norm_bytes(work, tokens)
    planned += 0 if number_bytes == 4 else 2 * sum(each.numel() for each in policy.parameters())
    assert 0.8 * planned < kept < 1.05 * planned


ppo_values = st.fixed_dictionaries(
    {
        "prompts_per_round": st.integers(1, 64),
        "rollouts_per_prompt": st.integers(1, 9),
        "max_tokens": st.integers(1, 512),
        "max_prompt_tokens": st.integers(1, 512),
        "micro_batch_tokens": st.integers(1, 8192),
        "num_frozen_layers": st.integers(0, 30),
        "gradient_checkpointing": st.booleans(),
        "num_minibatches": st.just(1),
    }
)


def planned(values: Mapping[str, object], num_devices: int = 1, **more: object) -> Memory:
    config = TrainingConfig.model_validate({"ppo": {**values, **more}, "reward_model": {"num_trained_layers": 2}})
    return plan_memory(assume(config, size_of(SMOLLM2)), num_devices)


@settings(max_examples=30)
@given(ppo_values)
def test_memory_never_falls_with_rollouts_lengths_or_batches(values: dict[str, int]) -> None:
    before = planned(values)
    for name in ("prompts_per_round", "rollouts_per_prompt", "max_tokens", "max_prompt_tokens", "micro_batch_tokens"):
        after = planned(values, **{name: values[name] + 1})
        for old, new in zip(before.parts, after.parts, strict=True):
            assert new.bytes >= old.bytes, (name, old.name)
        assert after.peak >= before.peak


@settings(max_examples=30)
@given(ppo_values, st.integers(2, 8))
def test_a_round_grows_with_its_prompts_and_activations_with_a_micro_batch(values: dict[str, int], times: int) -> None:
    more = planned(values, prompts_per_round=times * values["prompts_per_round"])
    assert part(more, "rollouts of a round") == pytest.approx(times * part(planned(values), "rollouts of a round"))
    longest = values["max_prompt_tokens"] + values["rollouts_per_prompt"] * values["max_tokens"]
    one, many = (planned(values, micro_batch_tokens=factor * longest) for factor in (1, times))
    assert part(many, "policy: activations") == pytest.approx(times * part(one, "policy: activations"))


@settings(max_examples=30)
@given(ppo_values)
def test_frozen_layers_and_checkpointing_save_memory(values: dict[str, int]) -> None:
    whole = planned(values, num_frozen_layers=0, gradient_checkpointing=False)
    assert planned(values, num_frozen_layers=1, gradient_checkpointing=False).total("update") < whole.total("update")
    assert planned(values, num_frozen_layers=0, gradient_checkpointing=True).total("update") < whole.total("update")


@settings(max_examples=30)
@given(ppo_values, st.integers(2, 16))
def test_devices_share_the_models_and_the_round_but_not_the_engine(values: dict[str, int], num_devices: int) -> None:
    alone, shared = planned(values), planned(values, num_devices)
    for name in (
        "value model: gradients and moments",
        "policy: Adam's moments, fp32",
        "value model: weights, fp32",
        "rollouts of a round",
    ):
        assert num_devices * part(shared, name) == pytest.approx(part(alone, name))
    for name in ("engine: weights", "engine: KV cache", "policy: activations", "reference"):
        assert part(shared, name) == part(alone, name)
    kept = 2 * (size_of(SMOLLM2).embedding + size_of(SMOLLM2).norm)
    divided = part(alone, "reference in PPO") - kept
    assert part(shared, "reference in PPO") - kept == pytest.approx(divided / num_devices)
    # The first device fits the reward model, while nothing is divided.
    assert shared.total("reward model") == alone.total("reward model")
    assert part(alone, "layers gathered from all devices") == 0 < part(shared, "layers gathered from all devices")


def test_what_is_not_used_takes_nothing() -> None:
    plain = plan_memory(assume(TrainingConfig(), size_of(QWEN)))
    mixed = planned({"ema_decay": 0.9, "ptx": {"data": "text.txt"}})
    for name in ("policy: average of weights", "policy: PPO's gradient set apart"):
        assert part(plain, name) == 0
        assert part(mixed, name) == part(mixed, "policy: trained weights, fp32")
    assert part(plain, "policy under its adapters") == 0
    assert part(planned({"ptx": {"data": "text.txt", "gamma": 1.0}}), "policy: PPO's gradient set apart") == 0


def test_the_fullest_moment_holds_the_peak() -> None:
    memory = planned({})
    held = memory.at(memory.fullest)
    assert memory.peak == sum(each.bytes for each in held) == max(map(memory.total, MOMENTS))
    assert [each.bytes for each in held] == sorted((each.bytes for each in held), reverse=True)
    assert memory.fullest == "update"
    assert "policy as it is loaded" not in [each.name for each in held]
