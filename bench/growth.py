"""How a PPO round's scoring and update grow with K, length, batch and model size, beside what the plan predicts.

    python -m bench.growth --json FILE [--quick]

One axis is varied at a time. Models are SmolLM2's kind with random weights, and completions are random tokens of
exactly the length that is asked for: what is learned has no influence on the time. A plot and a table go to
docs/results/growth.md. `--quick` takes tiny models, and shows only that it runs.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Canvas
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.result import (
    HEADINGS,
    BenchResult,
    Figure,
    add_arguments,
    bench_result,
    cells,
    circumstances,
    markdown_table,
    report,
    save_plot,
)
from bench.roofs import CPU_DTYPE, matmul_roof, roofs
from training.config import LoraConfig, PpoConfig, RewardModelConfig, TrainingConfig
from training.models.device import copy_dtype
from training.models.policy import SharedLayers, UpperLayers
from training.models.reward import RewardModel
from training.planning.hardware import Hardware
from training.planning.model_size import read_model
from training.planning.plan import make_plan
from training.ppo import rounds as ppo
from training.ppo.learner import make_learner
from training.ppo.rollouts import Request, Rollout

_RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
NUM_ROUNDS = 3  # the first warms up
_NO_LIMIT = 1e9
_FROZEN_SHARE = 2 / 3
_LAST_SPECIAL_TOKEN = 16
Shapes = dict[str, tuple[int, ...]]
# Layers, width, width between a layer's two halves, heads, heads of keys: SmolLM2's sizes, and one below them.
_SIZES: Shapes = {"30M": (12, 320, 864, 5, 5), "135M": (30, 576, 1536, 9, 3), "360M": (32, 960, 2560, 15, 5)}
TINY_SIZES: Shapes = {"tiny": (3, 64, 128, 2, 2), "small": (4, 64, 128, 2, 2)}
_VOCABULARY, _TINY_VOCABULARY = 49_152, 512


@dataclass(frozen=True)
class _Point:
    """The size of one round."""

    model: str
    num_prompts: int = 8
    k: int = 4
    completion_tokens: int = 64
    prompt_tokens: int = 64


Axes = dict[str, tuple[str, tuple[int, ...]]]
_AXES: Axes = {
    "completions of a prompt (K)": ("k", (1, 2, 4, 8)),
    "tokens of a completion": ("completion_tokens", (32, 64, 128, 256)),
    "prompts of a round": ("num_prompts", (4, 8, 16, 32)),
}
QUICK_AXES: Axes = {"completions of a prompt (K)": ("k", (1, 2))}


@dataclass(frozen=True)
class Measured:
    """Seconds of a round's scoring and update, measured and predicted, and the share of the roof that was reached."""

    axis: str
    x: float
    label: str
    scoring: tuple[float, ...]
    update: tuple[float, ...]
    predicted: float
    scoring_share: float
    update_share: float

    @property
    def seconds(self) -> list[float]:
        """Seconds of each round."""
        return [scoring + update for scoring, update in zip(self.scoring, self.update, strict=True)]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    measured_roofs = roofs(arguments.quick)
    bandwidth, products = measured_roofs[1].value, matmul_roof(measured_roofs).value
    hardware = Hardware("this machine", bandwidth, products, memory_gib=1.0, computes_in=CPU_DTYPE)
    sizes, axes = (TINY_SIZES, QUICK_AXES) if arguments.quick else (_SIZES, _AXES)
    found = run_all(sizes, axes, hardware, _RESULTS.parent.parent / "var" / "bench" / "growth")
    result = bench_result("growth", [*measured_roofs, *figures(found)])
    report(result, arguments.json)
    if not arguments.quick:
        write_page(found, result, _RESULTS)


def run_all(sizes: Shapes, axes: Axes, hardware: Hardware, work: Path) -> list[Measured]:
    """Measures each axis with the second model (the first if there is one only), and then each model."""
    middle = _Point(list(sizes)[min(1, len(sizes) - 1)])
    points = [
        (axis, value, replace(middle, **{field: value}))  # type: ignore[arg-type]
        for axis, (field, values) in axes.items()
        for value in values
    ]
    found = []
    for axis, x, point in points:
        found.append(_measure(axis, float(x), point, sizes[point.model], hardware, work))
    for name, shape in sizes.items():
        found.append(_measure("parameters of the model", 0.0, _Point(name), shape, hardware, work))
    return found


def _measure(axis: str, x: float, point: _Point, shape: Sequence[int], hardware: Hardware, work: Path) -> Measured:
    """Runs the rounds of one point."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY if point.model in _SIZES else _TINY_VOCABULARY,
        num_hidden_layers=shape[0], hidden_size=shape[1],
        intermediate_size=shape[2], num_attention_heads=shape[3], num_key_value_heads=shape[4],
        tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    (work / "config.json").write_text(config.to_json_string(use_diff=False))
    size, recipe = read_model(work / "config.json"), _training_config(point, shape[0])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=CPU_DTYPE, attn_implementation="sdpa").eval()
    rounds = _run_rounds(model, recipe, point)[1:]
    plan = make_plan(recipe, size, hardware, point.prompt_tokens, point.completion_tokens)
    phases = {phase.name: phase.seconds for phase in plan.round}
    scoring, update = (tuple(each[f"seconds/{name}"] for each in rounds) for name in ("scoring", "update"))
    label = f"{point.model}, {point.num_prompts} prompts, K = {point.k}, {point.completion_tokens} tokens"
    found = Measured(
        axis, x or float(size.total), label, scoring, update, phases["scoring"] + phases["update"],
        scoring_share=hardware.efficiency.scoring * phases["scoring"] / statistics.median(scoring),
        update_share=hardware.efficiency.update * phases["update"] / statistics.median(update),
    )  # fmt: skip
    print(f"{axis}: {label}: {statistics.median(found.seconds):.1f} s, predicted {found.predicted:.1f} s", flush=True)
    return found


def _training_config(point: _Point, num_layers: int) -> TrainingConfig:
    """Returns the recipe as shipped, of this size, without the limits that random tokens would exceed."""
    frozen = round(num_layers * _FROZEN_SHARE)
    return TrainingConfig(
        reward_model=RewardModelConfig(num_layers=frozen, num_trained_layers=0),
        ppo=PpoConfig(
            num_rounds=NUM_ROUNDS, prompts_per_round=point.num_prompts, rollouts_per_prompt=point.k,
            max_tokens=point.completion_tokens, max_prompt_tokens=point.prompt_tokens, num_minibatches=1,
            num_frozen_layers=frozen, max_kl=_NO_LIMIT, max_sampler_gap=_NO_LIMIT, max_held_out_drop=_NO_LIMIT,
            num_decay_rounds=0,
        ),
    )  # fmt: skip


def _run_rounds(model: Any, recipe: TrainingConfig, point: _Point) -> list[dict[str, Any]]:
    """Returns the metrics of each round of PPO on random tokens."""
    config, shared = recipe.ppo, SharedLayers(model.requires_grad_(False))
    rewards = RewardModel(shared, recipe.reward_model)
    policy = UpperLayers(model, config.num_frozen_layers, shared.num_layers).trainable(
        LoraConfig(), dtype=copy_dtype(shared.device, stochastic_rounding=config.stochastic_rounding)
    )
    learner = make_learner(policy, rewards, rewards, config)
    drawn, vocabulary = random.Random(0), shared.head_VD.shape[0]

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(drawn.randrange(_LAST_SPECIAL_TOKEN, vocabulary) for _ in range(count))

    def draw(request: Request) -> list[list[Rollout]]:
        count = point.completion_tokens
        return [[Rollout(tokens(count), (0.0,) * count, False) for _ in range(point.k)] for _ in request.prompts]

    rounds: list[dict[str, Any]] = []
    hooks = ppo.PpoHooks(
        prompts=[tokens(point.prompt_tokens) for _ in range(point.num_prompts)],
        draw=draw,
        log=lambda index, count, metrics: rounds.append(metrics),
    )
    ppo.train(learner, config, hooks, seed=0)
    return rounds


def figures(found: Sequence[Measured]) -> list[Figure]:
    """Returns the seconds of each point beside the predicted ones, and the shares of the roof that the phases reach."""
    rows = []
    for each in found:
        seconds, name = each.seconds, f"{each.axis}: {each.label}"
        rows.append(Figure(name, statistics.median(seconds), "s", min(seconds), max(seconds)))
        rows.append(Figure(f"{name}: predicted", each.predicted, "s"))
    for phase in ("scoring", "update"):
        shares = [getattr(each, f"{phase}_share") for each in found]
        rows.append(Figure(f"{phase}: share of the roof", statistics.median(shares), "", min(shares), max(shares)))
    return rows


def write_page(found: Sequence[Measured], result: BenchResult, folder: Path) -> None:
    """Writes growth.md and growth.svg."""
    _draw(found, folder / "growth.svg")
    lines = [
        "# How cost grows", "", f"`{result.command}` on {circumstances(result)}.", "",
        "Scoring and update of one round of PPO, a third of the layers trained as in the recipe, one optimizer step a "
        f"pass; medians of {NUM_ROUNDS - 1} rounds with their least and greatest. Rollouts are not timed. Dashed: what "
        "the plan of `alignd train --dry-run` predicts from these lengths and the roof measured above.",
        "",
        "![seconds of a round, by K, length, batch and model size](growth.svg)", "",
        markdown_table(HEADINGS, map(cells, result.figures)), "",
    ]  # fmt: skip
    (folder / "growth.md").write_text("\n".join(lines))


def _draw(found: Sequence[Measured], path: Path) -> None:
    """Draws a panel for each axis: measured seconds, and predicted ones dashed."""
    axes_names = list(dict.fromkeys(each.axis for each in found))
    canvas = Canvas(figsize=(3.2 * len(axes_names), 3.2))
    for panel, axis in zip(canvas.subplots(1, len(axes_names), sharey=True), axes_names, strict=True):
        points = [each for each in found if each.axis == axis]
        xs = [each.x for each in points]
        panel.plot(xs, [statistics.median(each.seconds) for each in points], "o-", color="#4c72b0", label="measured")
        panel.plot(xs, [each.predicted for each in points], "--", color="#777777", label="predicted")
        panel.set_xlabel(axis)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        if axis == axes_names[0]:
            panel.set_ylabel("seconds of a round")
            panel.legend()
    canvas.tight_layout()
    save_plot(canvas, path)


if __name__ == "__main__":
    main()
