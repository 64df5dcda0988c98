"""Refreshes the reward model from the store's rankings, and keeps the previous one if the new one is worse.

Heads alone are fitted anew to all rankings. A model with its own layers is trained further from the previous one, on
new rankings mixed with old ones. A second model, the held-out reward model, is heads alone that are fitted to the
rankings of held-out labelers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from feedback.durable import write_json
from training.config import RewardModelConfig
from training.data.dataset import Dataset, LogRange
from training.data.groups import RankedExample
from training.models.policy import SharedLayers
from training.models.reward import RewardModel, load, save
from training.rewards.evaluation import RewardEvaluation, evaluate_rewards
from training.rewards.fit import fit

REWARD_MODEL_FILE = "reward_model.safetensors"
POINTER_FILE = "reward_model.json"

Log = Callable[[str, int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Fitted:
    """A reward model that was accepted, and which rankings it has seen."""

    run_id: str
    digest: str
    seqs: tuple[int, ...]
    """Numbers of the rankings that are not new to it. One whose sample came late is new, even if its number is low."""
    num_rankings: int = 0
    rankings: tuple[LogRange, ...] = ()
    """Where in the log they are."""

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Fitted:
        """Reads what `asdict` wrote. Earlier releases wrote only the number of the last ranking."""
        return cls(
            found["run_id"],
            found["digest"],
            tuple(found["seqs"] if "seqs" in found else range(found["last_seq"] + 1)),
            found.get("num_rankings", 0),
            tuple(LogRange(**each) for each in found.get("rankings", ())),
        )


def current(runs_dir: Path) -> Fitted | None:
    """Returns the reward model that the last refresh accepted; None before the first refresh."""
    path = runs_dir / POINTER_FILE
    if not path.exists():
        return None
    fitted = Fitted.of_json(json.loads(path.read_text()))
    return fitted if (runs_dir / fitted.run_id / REWARD_MODEL_FILE).exists() else None


def accept(runs_dir: Path, fitted: Fitted) -> None:
    """Makes this the reward model that the next refresh starts from."""
    write_json(runs_dir / POINTER_FILE, asdict(fitted))


def refresh(
    config: RewardModelConfig,
    shared: SharedLayers,
    data: Dataset,
    run_path: Path,
    reference_digest: str,
    *,
    seed: int,
    log: Log,
) -> tuple[RewardModel, Fitted]:
    """Fits and evaluates a new model, and returns the model to use: the previous one if held-out accuracy fell.

    Raises:
        TrainingError: the loss is not finite.
    """
    model, before = RewardModel(shared, config), RewardModel(shared, config)
    parent = current(run_path.parent)
    has_parent = parent is not None and parent.run_id != run_path.name
    if parent and has_parent:
        has_parent = load(before, run_path.parent / parent.run_id / REWARD_MODEL_FILE, reference_digest)
    warm = has_parent and len(model.layers) > 0
    if warm and parent and {example.seq for example in data.training} <= set(parent.seqs):
        return before, parent
    if warm:
        model.load_state_dict(before.state_dict())
    examples = list(data.training)
    if warm and parent:
        examples = mixed(examples, frozenset(parent.seqs), config.replay_share, seed)
    fit(
        model, examples, config, seed=seed, warm=warm,
        log=lambda index, count, metrics: log("reward_model", index, count, metrics),
    )  # fmt: skip
    found = evaluate_rewards(model, data.held_out)
    earlier = evaluate_rewards(before, data.held_out) if has_parent else None
    refused = bool(found and earlier and found.accuracy < earlier.accuracy - config.max_accuracy_drop)
    if found:
        metrics: dict[str, Any] = {"reward_model/refused": float(refused), **_as_metrics(found)}
        if earlier:
            metrics["reward_model/parent_accuracy"] = earlier.accuracy
        log("reward_model_evaluation", 0, 1, metrics)
    if refused and parent:
        return before, parent
    digest = save(model, run_path / REWARD_MODEL_FILE, reference_digest)
    seqs = tuple(example.seq for example in data.training)
    return model, Fitted(run_path.name, digest, seqs, len(data.training), data.rankings)


def _as_metrics(found: RewardEvaluation) -> dict[str, Any]:
    """Returns the evaluation's figures and tables by the names that they have in metrics.jsonl."""
    tables = asdict(found)
    return {
        "reward_model/held_out_accuracy": tables.pop("accuracy"),
        "reward_model/accuracy_low": tables.pop("low"),
        "reward_model/accuracy_high": tables.pop("high"),
        "reward_model/held_out_comparisons": tables.pop("num_comparisons"),
        **tables,
    }


def mixed(examples: list[RankedExample], known: frozenset[int], replay_share: float, seed: int) -> list[RankedExample]:
    """Returns all rankings that are not `known` by number, and random known ones, a `replay_share` of the whole."""
    new = [example for example in examples if example.seq not in known]
    old = [example for example in examples if example.seq in known]
    count = min(len(old), round(len(new) * replay_share / (1 - replay_share)))
    return new + random.Random(seed).sample(old, count)


def fit_held_out_model(
    config: RewardModelConfig, shared: SharedLayers, examples: tuple[RankedExample, ...], *, seed: int
) -> RewardModel:
    """Fits heads alone to the rankings of held-out labelers."""
    heads_alone = config.model_copy(update={"num_trained_layers": 0})
    held_out_model = RewardModel(shared, heads_alone)
    fit(held_out_model, examples, heads_alone, seed=seed, warm=False, log=lambda index, count, metrics: None)
    return held_out_model
