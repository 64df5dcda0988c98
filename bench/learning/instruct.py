"""InstructGPT in miniature: base, few-shot, SFT, PPO and PPO-ptx, judged by the labelers' true utility.

Every stage leaves its result in a folder and is skipped where it is there, so that an experiment of hours can be gone
on with. The policies are judged on held-out prompts that nothing was learned from, one completion each.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from bench.learning.lab import Asked, Lab
from bench.learning.prompts import few_shot_prefix, held_out_prompts, train_prompts
from bench.learning.tax import hellaswag_accuracy, read_hellaswag, read_wikitext, wikitext_loss
from training import ppo, ptx
from training.config import LoraConfig, PpoConfig, PtxConfig, RewardModelConfig, SftConfig
from training.groups import Group, RankedExample
from training.learner import make_learner
from training.policy_model import SharedLayers, load_model, save_policy, upper_layers_of
from training.reward_evaluation import evaluate_rewards
from training.reward_fit import fit
from training.reward_model import RewardModel, normalise, score_groups
from training.rollouts import Rollout
from training.sft import Demonstration, fine_tune

HELD_OUT_LABELERS = 10
TAX_WINDOW = 512
REWARD_MODEL = RewardModelConfig(max_rankings=100_000, held_out_share=0.0)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    num_rankings: int
    ks: range
    num_demonstrations: int
    best_of: int
    num_steps: int
    num_held_out: int
    tax_tokens: int
    tax_items: int
    refreshes: int = 2
    """Refreshes of the reward model during PPO where it is online; rankings and rounds are split evenly."""


QUICK = Size(120, range(4, 7), 48, 8, 6, 100, 4 * TAX_WINDOW, 60)
FULL = Size(360, range(4, 10), 192, 16, 24, 300, 24 * TAX_WINDOW, 400)
SFT = SftConfig(num_epochs=3, learning_rate=1e-5, min_demonstrations=8)


def ppo_config(size: Size, wikitext: Path | None) -> PpoConfig:
    """The recipe as shipped; with the pretraining mix if there is text."""
    text = PtxConfig(data=str(wikitext)) if wikitext else PtxConfig()
    return PpoConfig(num_steps=size.num_steps, ptx=text)


@dataclass(frozen=True)
class Experiment:
    """One seed of one utility: its laboratory, its size, and where its stages leave what they found."""

    lab: Lab
    size: Size
    folder: Path

    def once(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `stage` found, now or in an earlier attempt."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            print(f"{self.folder.name}: {name}", flush=True)
            began = time.monotonic()
            found = stage() | {"seconds": time.monotonic() - began}
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps(found))
            draft.rename(path)
        loaded: dict[str, Any] = json.loads(path.read_text())
        return loaded


def run_experiment(experiment: Experiment) -> dict[str, Any]:
    """Runs all stages and returns what they found, by name."""
    experiment.folder.mkdir(parents=True, exist_ok=True)
    lab, size = experiment.lab, experiment.size
    train = lab.ask(train_prompts(size.num_rankings))
    found: dict[str, Any] = {"sft": experiment.once("sft", lambda: make_sft(experiment, train))}
    text = write_pretraining_text(experiment.folder / "wikitext.txt")
    variants: dict[str, Callable[[], dict[str, Any]]] = {
        "ppo": lambda: optimise(experiment, train, "ppo", None, refreshes=0),
        "ppo-ptx": lambda: optimise(experiment, train, "ppo-ptx", text, refreshes=0),
        "online": lambda: optimise(experiment, train, "online", None, refreshes=size.refreshes),
    }
    for name, variant in variants.items():
        found[name] = experiment.once(name, variant)
    held_out = held_out_prompts(size.num_held_out)
    policies = {
        "base": lab.base,
        "few-shot": lab.base,
        **{name: experiment.folder / name for name in ("sft", *variants)},
    }
    for name, folder in policies.items():
        shots = few_shot_prefix() if name == "few-shot" else []
        found[f"answers-{name}"] = experiment.once(f"answers-{name}", lambda: answer(lab, folder, held_out, shots))  # noqa: B023
        if name not in ("few-shot", "online"):
            found[f"tax-{name}"] = experiment.once(f"tax-{name}", lambda: tax(folder, size))  # noqa: B023
    return found


def answer(lab: Lab, folder: Path, prompts: Sequence[str], shots: Sequence[Any]) -> dict[str, Any]:
    """Utility of one completion of each held-out prompt, and the first few texts."""
    lab.load(folder)
    asked = lab.ask(prompts, shots)
    drawn = lab.draw(asked, 1, salt=500_000)
    worth = [values[0] for values in lab.utilities(asked, drawn)]
    return {"utilities": worth, "texts": [lab.text(each[0]) for each in drawn[:6]], "prompts": list(prompts[:6])}


def tax(folder: Path, size: Size) -> dict[str, Any]:
    """WikiText-2 loss, window by window, and HellaSwag hits, item by item."""
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    loss = wikitext_loss(model, tokenizer, read_wikitext("test"), size.tax_tokens, TAX_WINDOW)
    hits = hellaswag_accuracy(model, tokenizer, read_hellaswag()[: size.tax_items])
    return {"wikitext": list(loss.values), "hellaswag": list(hits.values)}


def make_sft(experiment: Experiment, train: Sequence[Asked]) -> dict[str, Any]:
    """Labelers demonstrate: the best, by the utility, of several completions of each prompt. Then SFT on these."""
    lab, size = experiment.lab, experiment.size
    lab.load(lab.base)
    shown = train[: size.num_demonstrations]
    drawn = lab.draw(shown, size.best_of, salt=100)
    worth = lab.utilities(shown, drawn)
    best = [rollouts[values.index(max(values))] for rollouts, values in zip(drawn, worth, strict=True)]
    demonstrations = [
        Demonstration(each.token_ids, rollout.token_ids) for each, rollout in zip(shown, best, strict=True)
    ]
    labelers = lab.labelers(train[-32:])
    rewards, shared = reward_model_of(experiment, lab.base, lab.rank(train[-64:], labelers, size.ks, salt=200))
    validation = train[-32:]

    def judge(weights: dict[str, torch.Tensor]) -> float:
        lab.engine.load_weights(weights)
        drawn = [each[0] for each in lab.draw(validation, 1, salt=300)]
        return float(torch.cat(score_groups(rewards, shared, as_groups(validation, drawn))).mean())

    scratch = experiment.folder / "scratch"
    weights, epochs = fine_tune(
        lab.base, lab.tokenizer, demonstrations, judge, SFT, scratch, seed=lab.seed, log=lambda epoch: None
    )
    shutil.rmtree(scratch, ignore_errors=True)
    target = experiment.folder / "sft"
    shutil.copytree(lab.base, target, dirs_exist_ok=True)
    save_file({n: t.contiguous() for n, t in weights.items()}, target / "model.safetensors", {"format": "pt"})
    return {"epochs": [dataclasses.asdict(epoch) for epoch in epochs]}


def as_groups(asked: Sequence[Asked], drawn: Sequence[Rollout]) -> list[Group]:
    """One completion of each prompt, as the reward model reads them."""
    return [Group(each.token_ids, (rollout.token_ids,)) for each, rollout in zip(asked, drawn, strict=True)]


def reward_model_of(
    experiment: Experiment, policy: Path, examples: Sequence[RankedExample], shared: SharedLayers | None = None
) -> tuple[RewardModel, SharedLayers]:
    """A reward model on the layers of `policy`, fitted to these rankings and normalised on what it writes."""
    lab = experiment.lab
    shared = shared or SharedLayers(load_model(policy))
    model = RewardModel(shared, REWARD_MODEL)
    fit(model, shared, examples, REWARD_MODEL, seed=lab.seed, warm=False, log=lambda *_: None)
    normalise(model, shared, [Group(each.group.prompt, each.group.completions) for each in examples[:64]])
    return model, shared


def optimise(
    experiment: Experiment, train: Sequence[Asked], name: str, wikitext: Path | None, *, refreshes: int
) -> dict[str, Any]:
    """PPO from the SFT policy. With refreshes, rankings come in as many parts more, each of the policy of then."""
    lab, size = experiment.lab, experiment.size
    sft = experiment.folder / "sft"
    parts = refreshes + 1
    config = ppo_config(size, wikitext).model_copy(update={"num_steps": size.num_steps // parts})
    shared, policy_folder, examples = SharedLayers(load_model(sft)), sft, list[RankedExample]()
    rounds: list[dict[str, float]] = []
    accuracy = None
    for part in range(parts):
        lab.load(policy_folder)
        if part == 0:
            labelers = lab.labelers(train[:32])
        asked = train[part * len(train) // parts : (part + 1) * len(train) // parts]
        examples += lab.rank(asked, labelers, size.ks, salt=1000 * (part + 1), first_seq=len(examples))
        known = [e for e in examples if e.labeler not in held_out_labelers()]
        unknown = [e for e in examples if e.labeler in held_out_labelers()]
        rewards, _ = reward_model_of(experiment, sft, known, shared)
        judge, _ = reward_model_of(experiment, sft, unknown, shared)
        judged = evaluate_rewards(rewards, shared, unknown)
        accuracy = dataclasses.asdict(judged) if judged else None
        reason = run_ppo(experiment, train, config, shared, policy_folder, rewards, judge, rounds, part, name)
        policy_folder = experiment.folder / name
    return {"rounds": rounds, "stopped": reason, "reward_model": accuracy}


def held_out_labelers() -> set[str]:
    """Those whose rankings only measure."""
    return {f"simulated-{index:03d}" for index in range(HELD_OUT_LABELERS)}


def run_ppo(
    experiment: Experiment,
    train: Sequence[Asked],
    config: PpoConfig,
    shared: SharedLayers,
    start: Path,
    rewards: RewardModel,
    judge: RewardModel,
    rounds: list[dict[str, float]],
    part: int,
    name: str,
) -> str | None:
    """One stretch of PPO; appends what each round came to, with the true utility of its rollouts, to `rounds`."""
    lab = experiment.lab
    policy = upper_layers_of(start, shared, min(config.num_frozen_layers, shared.num_layers - 1), LoraConfig())
    learner = make_learner(shared, policy, rewards, judge, config)
    by_tokens = {each.token_ids: each for each in train}
    utilities: list[float] = []

    def sample(prompts: Sequence[tuple[int, ...]], seed: int) -> list[list[Rollout]]:
        drawn = lab.draw_tokens(prompts, config.rollouts_per_prompt, seed)
        worth = lab.utilities([by_tokens[tuple(prompt)] for prompt in prompts], drawn)
        utilities.append(sum(map(sum, worth)) / sum(map(len, worth)))
        return drawn

    def log(step: int, num_steps: int, metrics: dict[str, Any]) -> None:
        rounds.append({**metrics, "part": part, "utility": utilities[-1]})

    world = ppo.World(list(by_tokens), sample, lab.engine.load_weights, log, pretraining(lab, config.ptx))
    reason = ppo.train(learner, config, world, seed=lab.seed * 101 + part)
    target = experiment.folder / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    save_policy(target, shared, policy, lab.base)
    return reason


def pretraining(lab: Lab, config: PtxConfig) -> Iterator[tuple[int, ...]] | None:
    """Sequences of the pretraining text; None for plain PPO."""
    if not config.data:
        return None
    return ptx.sequences(ptx.pretraining_texts(config, lab.seed), lab.tokenizer, config.sequence_tokens)


def write_pretraining_text(path: Path) -> Path:
    """WikiText-2's validation part, a paragraph a line; the test part measures."""
    paragraphs = [line for line in read_wikitext("valid").splitlines() if line.strip()]
    random.Random(0).shuffle(paragraphs)
    path.write_text("\n".join(paragraphs))
    return path
