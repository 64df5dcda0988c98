"""Makes the folder of a run that reads like a real one, for tests of what reports runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToJson

from alignd.v1.policy_manifest_pb2 import Evaluation, LogRange, PolicyManifest, TrainingLineage
from training.config import PpoConfig, TrainingConfig
from training.runs.folder import RunFolder, SamplePair, Unranked

HOSTILE = "<script>alert('x')</script> & \"more\""
RUN_ID = "20261124T101500-a1b2c3"
START = 1_795_531_655.0
SAMPLES = (
    SamplePair(
        "How do I defrost cooked chicken?",
        "I'm sorry for any confusion, but as an AI I can only share general advice about chicken, and there are many "
        "different ways in which one might consider",
        "Put the chicken in the fridge overnight. If you are in a hurry, use the microwave's defrost setting.",
    ),
    SamplePair("Tell me about LEDs.\n<b>In bold!</b>", HOSTILE, "LEDs are made from semiconductors."),
    SamplePair("When was the declaration of independence made?", "", "On 4 July 1776, in Philadelphia."),
    SamplePair(
        "How can I get better at proofreading?",
        "Proofreading is a very important part of writing, and there are many things to know about it, such as that",
        "Read the text aloud, slowly, a day after you wrote it, and look for one kind of mistake at a time.",
    ),
    SamplePair("Half a pair", "a lone surrogate: \ud83d", "fine"),
    SamplePair("Can you tell me when it is cheaper to buy than to lease?", "It depends.", "When you keep it for long."),
)
READ = {
    "time": START,
    "phase": "data",
    "index": 0,
    "count": 1,
    "rankings/read": 500,
    "rankings/learned": 320,
    "rankings/measured": 90,
    "rankings/left_out/held_out_in_part": 88,
    "rankings/left_out/not_rendered": 2,
    "rankings/unrendered": "s17 (TemplateError: <b>no system turn</b>); s18 (KeyError: 99)",
    "prompts/read": 400,
    "prompts/learned": 300,
    "prompts/measured": 100,
}
EVALUATION = {
    "reward_model/held_out_accuracy": 0.684,
    "reward_model/accuracy_low": 0.642,
    "reward_model/accuracy_high": 0.726,
    "reward_model/held_out_comparisons": 912,
    "reward_model/parent_accuracy": 0.671,
    "reward_model/refused": 0,
    "by_k": [[4, 0.66, 432], [6, 0.69, 300], [9, 0.75, 180]],
    "by_labeler": [["ana", 0.71, 300], ["ben", 0.70, 280], ["cy", 0.64, 332]],
    "by_length_difference": [
        [None, -20, 0.55, 180], [-20, -5, 0.62, 190], [-5, 5, 0.68, 172], [5, 20, 0.75, 186], [20, None, 0.82, 184],
    ],
    "calibration": [[0.53, 0.54, 183], [0.60, 0.58, 183], [0.68, 0.66, 182], [0.79, 0.74, 182], [0.91, 0.84, 182]],
    "uncertainty": [[0.1, 0.79, 183], [0.2, 0.72, 183], [0.3, 0.68, 182], [0.45, 0.63, 182], [0.8, 0.60, 182]],
}  # fmt: skip


BEST_OF_N = [[1, 0.0, 0.0, 0.0], [2, 0.1931, 0.55, 0.36], [4, 0.6363, 1.02, 0.6]]


def ppo_step(i: int, num_rounds: int) -> dict[str, float | str]:
    """Makes up the figures of a round: the scores of both reward models rise, and then they part."""
    wave, part = math.sin(2.3 * i), i / max(1, num_rounds)
    return {
        "objective/kl": 0.01 + 6.5 * part**1.4 + 0.15 * abs(wave),
        "objective/score": 2.1 * (1 - math.exp(-3 * part)) + 0.07 * wave,
        "objective/held_out_score": 2.2 * part - 1.8 * part**2 + 0.09 * math.cos(2.9 * i),
        "objective/entropy": 2.4 - 0.9 * part + 0.05 * wave,
        "completion/length": 60 - 22 * part + 1.5 * wave,
        "completion/eos_rate": min(1.0, 0.12 + 0.85 * part + 0.02 * wave),
        "rollout/sampler_gap": 0.006 + 0.002 * abs(wave),
        "policy/loss": -0.01 + 0.002 * wave,
        "policy/clipfrac": 0.02 + 0.08 * part + 0.01 * abs(wave),
        "policy/approx_kl": 0.004 + 0.01 * part + 0.002 * abs(wave),
        "policy/grad_norm": 0.6,
        "policy/kl_coef": 0.1,
        "val/loss": 0.8 - 0.5 * part,
        "val/clipfrac": 0.1 - 0.06 * part + 0.01 * abs(wave),
        "val/explained_variance": 0.6 - 2.2 * math.exp(-6 * part),
        "ptx/loss": 3.1,
        "ptx/gamma": 2.5,
        "ptx/grad_ratio": 1.1,
        "seconds/rollouts": 14 + 2 * abs(wave),
        "seconds/scoring": 5.5 + 0.4 * wave,
        "seconds/update": 9.0,
    }


def make_lines(num_rounds: int = 40) -> list[dict[str, Any]]:
    """Returns all lines of a run that came to its end."""
    lines: list[dict[str, Any]] = []

    def log(phase: str, step: int, count: int, metrics: Mapping[str, Any]) -> None:
        time = lines[-1]["time"] + 7.5 if lines else START
        lines.append({"time": time, "phase": phase, "index": step, "count": count, **metrics})

    for step in (7, 15, 23):
        log("reward_model", step, 24, {"reward_model/loss": 0.58, "reward_model/accuracy": 0.74} if step == 23 else {})
    log("reward_model_evaluation", 0, 1, EVALUATION)
    log("normalise", 0, 1, {"reward_model/reference_std": 1.31, "best_of_n": BEST_OF_N})
    for step in range(num_rounds):
        log("ppo", step, num_rounds, ppo_step(step, num_rounds))
    won = {
        "reward_model/win_rate_over_reference": 0.711,
        "low": 0.59,
        "high": 0.806,
        "prompts": 64,
        "wins": 725,
        "ties": 6,
        "losses": 293,
        "objective/kl_from_reference": 5.9,
        "score": 1.94,
        "held_out_score": 0.42,
    }
    log("evaluate", 0, 1, won)
    log("register", 0, 1, {"version": 2, "promoted": 1.0})
    log("done", 0, 1, {"version": 2})
    return lines


LABEL_NEXT = [
    Unranked(f"s{index}", 1.25 - index / 10, f"Unranked question {index}?", ("First.", HOSTILE)) for index in range(7)
]


def make_manifest() -> PolicyManifest:
    return PolicyManifest(
        version=2,
        parent_version=1,
        reference_version=1,
        weight_digest="5c1f" * 16,
        training=TrainingLineage(
            run_id=RUN_ID,
            algorithm="ppo-ptx",
            reward_model_digest="9d07" * 16,
            rankings=[LogRange(topic="alignd.rankings.v1", partition=0, first_offset=0, last_offset=319)],
            num_rankings=320,
            num_prompts=240,
        ),
        evaluations=[
            Evaluation(name="objective/kl_from_reference", value=5.9, low=5.4, high=6.4, count=64),
            Evaluation(name="gsm8k/accuracy", value=0.041, low=0.03, high=0.055, count=1319),
        ],
        code_version="0.1.0",
    )


def make_folder(
    root: Path, lines: Sequence[Mapping[str, Any]], *, samples: Sequence[SamplePair] = SAMPLES, manifest: bool = True
) -> Path:
    """Writes a run's folder as a run writes it."""
    run = RunFolder(root / RUN_ID)
    run.path.mkdir(parents=True)
    recipe = TrainingConfig(seed=7, ppo=PpoConfig(num_rounds=40, target_kl=6.0))
    (run.path / "recipe.json").write_text(recipe.model_dump_json())
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if samples:
        run.write_samples(samples)
        run.write_label_next(LABEL_NEXT)
    if manifest:
        (run.path / "manifest.json").write_text(MessageToJson(make_manifest()))
    return run.path


def phase(lines: Sequence[Mapping[str, Any]], *names: str) -> list[Mapping[str, Any]]:
    return [line for line in lines if line["phase"] in names]
