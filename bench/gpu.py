"""What the recipe for 1.3B needs of this machine's GPU, beside what its plan predicts: peak memory and seconds.

    python -m bench.gpu --json FILE [--quick]

The benchmark fits the reward model and runs rounds of PPO-ptx as the recipe has them, with the engine in the same
process. Rows are as long as they may be, and a batch has one optimizer step instead of eight. The model has the shape
of Qwen2.5-1.5B and random weights, and completions are random too: what is learned has no influence on the time.
`--quick` takes a tiny model, and shows only that it runs, also on a CPU, where memory is not measured.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from bench.result import Figure, add_arguments, bench_result, report, spread
from policies.precision import compute_dtype, short_name
from training.config import TrainingConfig
from training.data.groups import Group, RankedExample
from training.models.device import training_device
from training.models.policy import SharedLayers, load_model
from training.models.reward import RewardModel
from training.planning.hardware import GIB, Hardware, this_machine
from training.planning.memory import MOMENTS, Moment
from training.planning.model_size import read_model
from training.planning.plan import Plan, make_plan
from training.ppo import rounds as ppo
from training.ppo.learner import load_policy, make_learner
from training.ppo.rollouts import RolloutEngine
from training.recipes import load_recipe
from training.rewards.fit import fit

_RECIPE = "gpu-1.3b"
# The first warms up.
NUM_ROUNDS, _NUM_PROMPTS, _NUM_RANKINGS, _MOST_RANKED = 3, 16, 24, 9
_NO_LIMIT = 1e9
# Rollouts hardly ever end by themselves, since so few of a random policy's tokens are this one.
_EOS, _FIRST_TOKEN = 2, 16
_TINY_REWARD_MODEL = {"num_layers": 3, "num_trained_layers": 1, "max_rankings": 8}
_TINY_PPO = {"max_tokens": 32, "max_prompt_tokens": 32, "prompts_per_round": 4}
_TINY_PTX = {"examples_per_episode": 1.0, "sequence_tokens": 32}
_TINY_CACHE_MIB = 64


@dataclass
class Found:
    """Peak bytes at each moment, seconds of the reward model's fit, and the metrics of each round."""

    peaks: dict[Moment, int] = field(default_factory=dict)
    engine_seconds: float = 0.0
    fit_seconds: float = 0.0
    rounds: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    if not arguments.quick and training_device().type != "cuda":
        parser.error("this benchmark needs a GPU of 80 GB, and this machine has none; --quick shows that it runs")
    hardware, config = this_machine(), recipe(arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), arguments.quick)
        plan = make_plan(config, read_model(model), hardware, config.ppo.max_prompt_tokens, config.ppo.max_tokens)
        found = run(config, model)
    report(bench_result("gpu", figures(found, plan, hardware)), arguments.json)


def recipe(quick: bool) -> TrainingConfig:
    """Returns the recipe with few rounds and one optimizer step a batch, without the limits that would stop it."""
    values = load_recipe(_RECIPE).model_dump()
    values["reward_model"] |= {"max_rankings": _NUM_RANKINGS, "held_out_share": 0.0}
    values["ppo"] |= {
        "num_rounds": NUM_ROUNDS, "prompts_per_round": _NUM_PROMPTS, "num_minibatches": 1,
        "max_kl": _NO_LIMIT, "max_sampler_gap": _NO_LIMIT, "max_held_out_drop": _NO_LIMIT,
    }  # fmt: skip
    if quick:
        values["reward_model"] |= _TINY_REWARD_MODEL
        values["ppo"] |= _TINY_PPO
        values["ppo"]["ptx"] |= _TINY_PTX
        values["kv_cache_mib"] = _TINY_CACHE_MIB
    return TrainingConfig.model_validate(values)


def write_model(folder: Path, quick: bool) -> Path:
    """Writes a model with random weights, of Qwen2.5-1.5B's shape or a tiny one, and returns its folder."""
    layers, width, inner, heads, keys, vocabulary = (
        (3, 64, 128, 2, 2, 512) if quick else (28, 1536, 8960, 12, 2, 151_936)
    )
    config = Qwen2Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=keys, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=_EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(training_device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def run(config: TrainingConfig, model: Path) -> Found:
    """Fits the reward model and runs PPO, as training.run does."""
    found, drawn = Found(), random.Random(0)
    with _watched(found, "reward model"):
        started = time.perf_counter()
        engine = RolloutEngine(
            model,
            max_model_len=config.ppo.max_prompt_tokens + config.ppo.max_tokens,
            max_num_seqs=config.max_num_seqs,
            kv_cache_mib=config.kv_cache_mib,
            end_token_ids=[_EOS],
            seed=0,
        )
        found.engine_seconds = time.perf_counter() - started
        shared = SharedLayers(load_model(model))
        tokens = _token_source(drawn, shared.head_VD.shape[0])
        rewards, found.fit_seconds = _fitted(shared, config, tokens)
    held_out_model = RewardModel(shared, config.reward_model.model_copy(update={"num_trained_layers": 0}))
    with _watched(found, "start of PPO"):
        policy = load_policy(model, shared, config.ppo)
    learner = make_learner(policy, rewards, held_out_model, config.ppo)
    hooks = ppo.PpoHooks(
        prompts=[tokens(config.ppo.max_prompt_tokens) for _ in range(config.ppo.prompts_per_round)],
        draw=engine.draw,
        log=lambda index, count, metrics: found.rounds.append(metrics),
        pretraining=(tokens(config.ppo.ptx.sequence_tokens) for _ in itertools.count()),
    )
    with _watched(found, "update"):
        ppo.train(learner, config.ppo, hooks, seed=0)
    return found


@contextmanager
def _watched(found: Found, moment: Moment) -> Iterator[None]:
    """Records the peak memory that torch holds on the GPU inside the block, the engine's included."""
    if training_device().type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    yield
    found.peaks[moment] = torch.cuda.max_memory_allocated()


def _token_source(drawn: random.Random, vocabulary: int) -> Callable[[int], tuple[int, ...]]:
    """Returns a function that draws so many tokens."""
    return lambda count: tuple(drawn.choices(range(_FIRST_TOKEN, vocabulary), k=count))


def _fitted(
    shared: SharedLayers, config: TrainingConfig, tokens: Callable[[int], tuple[int, ...]]
) -> tuple[RewardModel, float]:
    """Returns a reward model fitted to rankings like the rollouts, and the seconds that took, after a warm-up."""
    model = RewardModel(shared, config.reward_model)

    def seconds(count: int, k: int) -> float:
        examples = [
            RankedExample(
                Group(tokens(config.ppo.max_prompt_tokens), tuple(tokens(config.ppo.max_tokens) for _ in range(k))),
                tuple(range(k)), f"labeler {index}", index,
            )
            for index in range(count)
        ]  # fmt: skip
        started = time.perf_counter()
        # A run's first fit begins with the heads alone, on 256 rankings, which the plan leaves out.
        fit(model, examples, config.reward_model, seed=0, warm=True, log=lambda *_: None)
        return time.perf_counter() - started

    seconds(2, _MOST_RANKED)
    return model, seconds(config.reward_model.max_rankings, config.ppo.rollouts_per_prompt)


def figures(found: Found, plan: Plan, hardware: Hardware) -> list[Figure]:
    """Returns the roofs; then memory and seconds, each with what was predicted; then shares of the roofs."""
    name = short_name(compute_dtype(training_device()))
    rows = [
        Figure(f"{hardware.name}: memory read", hardware.bandwidth_gb_s, "GB/s"),
        Figure(f"{hardware.name}: matrix product, {name}", hardware.matmul_gflop_s, "GFLOP/s"),
    ]
    for moment in MOMENTS:
        if moment in found.peaks:
            rows.append(Figure(f"memory, {moment}", found.peaks[moment] / GIB, "GiB"))
            rows.append(Figure(f"memory, {moment}: predicted", plan.memory.total(moment) / GIB, "GiB"))
    rows.append(Figure("engine: seconds to start", found.engine_seconds, "s"))
    predicted = {phase.name: phase.seconds for phase in (*plan.round, *plan.once)}
    predicted["update"] += predicted.pop("pretraining mix")
    measured: dict[str, Sequence[float]] = {
        each: [metrics[f"seconds/{each}"] for metrics in found.rounds[1:]] for each in ("rollouts", "scoring", "update")
    }
    measured["reward model"] = [found.fit_seconds]
    planned = hardware.efficiency
    efficiency = {"rollouts": planned.decode, "update": planned.update, "reward model": planned.reward_model}
    for phase, seconds in measured.items():
        share = efficiency.get(phase, planned.scoring) * predicted[phase] / statistics.median(seconds)
        rows.append(spread(f"{phase}: seconds", "s", seconds))
        rows.append(Figure(f"{phase}: predicted", predicted[phase], "s"))
        rows.append(Figure(f"{phase}: share of the roof", share, ""))
    gaps = [metrics["rollout/sampler_gap"] for metrics in found.rounds]
    return [*rows, spread("sampler against trainer", "nats a token", gaps)]


if __name__ == "__main__":
    main()
