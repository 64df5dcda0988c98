"""Predicts the memory and the time of a training run, before anything is loaded.

The functions are pure functions of a configuration, the model's config.json and the hardware. Assumptions are in
training.planning.workload, and the formulas in training.planning.memory and training.planning.phases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from training.config import TrainingConfig
from training.planning.hardware import GIB, Hardware
from training.planning.memory import Memory, plan_memory
from training.planning.model_size import ModelSize
from training.planning.phases import Phase, plan_once, plan_round
from training.planning.workload import Workload, assume
from training.ppo.ppo_math import rate_factor

# The rest is for the allocator's rounding and fragments, and for memory that libraries use themselves.
_SAFE_SHARE = 0.9
_NUM_NAMED_FIELDS = 3
# Versions are saved in bf16: the next number is this share away, or half of it.
_BF16_SPACING = 2.0**-7


@dataclass(frozen=True)
class Parameters:
    """A part of the models, with the numbers of its trained and its frozen parameters."""

    name: str
    trained: int
    frozen: int


@dataclass(frozen=True)
class Plan:
    """What a run needs. Memory is that of each device; phases are those of all devices together."""

    work: Workload
    hardware: Hardware
    parameters: tuple[Parameters, ...]
    memory: Memory
    round: tuple[Phase, ...]
    """Phases of one of the `ppo.num_rounds` rounds."""
    once: tuple[Phase, ...]
    """Phases that a run has once."""
    warnings: tuple[str, ...]

    @property
    def num_rounds(self) -> int:
        """The number of PPO's rounds."""
        return self.work.config.ppo.num_rounds

    @property
    def round_seconds(self) -> float:
        """The seconds of one round."""
        return sum(phase.seconds for phase in self.round)

    @property
    def run_seconds(self) -> float:
        """The seconds of the whole run."""
        return self.num_rounds * self.round_seconds + sum(phase.seconds for phase in self.once)

    @property
    def run_flops(self) -> float:
        """The FLOPs of the whole run."""
        return self.num_rounds * sum(each.flops for each in self.round) + sum(each.flops for each in self.once)


def make_plan(
    config: TrainingConfig,
    model: ModelSize,
    hardware: Hardware,
    prompt_tokens: float | None = None,
    completion_tokens: float | None = None,
) -> Plan:
    """Plans a run. Mean lengths of prompts and rollouts are assumed where they are not given.

    The run uses one of the machine's devices for each of `num_processes`.
    """
    work = assume(config, model, prompt_tokens, completion_tokens, hardware.computes_in.itemsize)
    num_devices, hardware = hardware.num_devices, replace(hardware, num_devices=config.num_processes)
    memory = plan_memory(work, config.num_processes)
    return Plan(
        work=work,
        hardware=hardware,
        parameters=_count_parameters(work),
        memory=memory,
        round=plan_round(work, hardware),
        once=plan_once(work, hardware),
        warnings=tuple(_warnings(work, hardware, memory, num_devices)),
    )


def _count_parameters(work: Workload) -> tuple[Parameters, ...]:
    """Counts the parameters of the policy's parts, the lowest first, and then of the reward and value models' own."""
    model, adapters = work.model, work.lora_parameters
    upper = work.policy_layers * model.layer
    parts = (
        Parameters("token embedding", 0, model.embedding),
        Parameters(f"layers, {work.frozen_layers} frozen", 0, work.frozen_layers * model.layer),
        Parameters(f"layers, {work.policy_layers} of the policy's own", *((0, upper) if adapters else (upper, 0))),
        Parameters("final norm", *((0, model.norm) if adapters else (model.norm, 0))),
        Parameters("output embedding", 0, model.head),
        Parameters(f"adapters of rank {work.config.ppo.lora.rank}", adapters, 0),
        Parameters("reward model", 0, work.reward_parameters),
        Parameters("value model", work.value_parameters, 0),
    )
    return tuple(part for part in parts if part.trained or part.frozen)


def _warnings(work: Workload, hardware: Hardware, memory: Memory, num_devices: int) -> Iterator[str]:
    yield from _fit_warnings(hardware, memory)
    yield from _length_warnings(work)
    yield from _step_warnings(work)
    config, num_layers = work.config, work.model.num_layers
    if config.ppo.num_frozen_layers >= num_layers:
        yield f"ppo.num_frozen_layers: the model has {num_layers} layers, so that only the last is trained"
    if config.reward_model.num_layers > num_layers:
        yield f"reward_model.num_layers: the model has {num_layers} layers, and all of them are used"
    if config.ppo.ptx.gamma is not None and not config.ppo.ptx.data:
        yield "ppo.ptx.data: it is empty, so that this is plain PPO, and ppo.ptx.gamma has no effect"
    if config.num_processes > num_devices:
        yield (
            f"num_processes: {config.num_processes} processes need a device each, and the number of devices here is "
            f"{num_devices}"
        )


def _fit_warnings(hardware: Hardware, memory: Memory) -> Iterator[str]:
    moment, peak = memory.fullest, memory.peak / GIB
    if peak <= _SAFE_SHARE * hardware.memory_gib:
        return
    verdict = "does not fit" if peak > hardware.memory_gib else "leaves less than a tenth free"
    fields = dict.fromkeys(part.field for part in memory.at(moment) if part.field)
    yield (
        f"memory: {peak:.1f} GiB of {hardware.memory_gib:.1f} GiB at its fullest ({moment}) {verdict}; "
        f"settings that would help most: {', '.join(list(fields)[:_NUM_NAMED_FIELDS])}"
    )


def _step_warnings(work: Workload) -> Iterator[str]:
    """Warns of a run that cannot move its weights: a step of Adam moves a weight by about the learning rate at most."""
    config = work.config.ppo
    rates = [
        config.learning_rate * rate_factor(index, config.num_rounds, config.num_warmup_rounds, config.num_decay_rounds)
        for index in range(config.num_rounds)
    ]
    most = config.num_epochs * config.num_minibatches * sum(rates)
    # Of a matrix whose outputs are as large as its inputs.
    weight = work.model.hidden**-0.5
    if not work.lora_parameters and most < weight * _BF16_SPACING:
        yield (
            f"ppo.learning_rate: all steps together move a weight by {most:.1e} at most, less than from one bf16 "
            f"number to the next at a usual weight of {weight:.2f}: few weights of the new version would differ"
        )


def _length_warnings(work: Workload) -> Iterator[str]:
    config, model = work.config, work.model
    longest = config.ppo.max_prompt_tokens + config.ppo.max_tokens
    if longest > model.max_positions:
        yield (
            f"ppo.max_tokens: a prompt and its rollout may have {longest} tokens together, "
            f"but the model was made for {model.max_positions}"
        )
    held = (config.kv_cache_mib << 20) // (work.cache_bytes * longest)
    wanted = min(config.max_num_seqs, work.rollouts)
    if held < wanted:
        yield (
            f"kv_cache_mib: {config.kv_cache_mib} MiB have room for {held} of the {wanted} rollouts drawn at once, at "
            f"their greatest length; {-(-wanted * work.cache_bytes * longest >> 20)} MiB would have room for all"
        )
    if work.longest_row > config.ppo.micro_batch_tokens:
        yield (
            f"ppo.micro_batch_tokens: a prompt with its rollouts may have {work.longest_row} tokens, and is never "
            "split; memory is planned for that"
        )
