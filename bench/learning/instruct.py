"""InstructGPT in miniature: base, few-shot, SFT, PPO and PPO-ptx, evaluated by the labelers' true utility.

Every stage leaves its result in a folder, and is skipped if the result is there, so that an experiment of hours can be
resumed. The policies are evaluated on held-out prompts, from which nothing was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.learning.answers import evaluate, score_answers
from bench.learning.demonstrate import make_sft
from bench.learning.experiment import TAX_WINDOW, Experiment, Size
from bench.learning.optimise import make_rewards, optimise
from bench.learning.prompts import train_prompts
from bench.learning.rewards import REWARD_MODEL
from bench.learning.stages import begin, once
from bench.learning.tax import hellaswag_accuracy, read_hellaswag, read_wikitext, wikitext_loss
from policies.precision import compute_dtype, short_name
from training.models.device import training_device
from training.models.policy import load_model

VARIANTS = ("ppo", "ppo-ptx")


def run_experiment(experiment: Experiment, variants: Sequence[str] = VARIANTS) -> dict[str, Any]:
    """Runs all stages and returns their results, by name. What the policies are worth is known before their tax is."""
    lab, size, folder = experiment.lab, experiment.size, experiment.folder
    train = lab.ask(train_prompts(size.num_rankings))
    for each in (folder, experiment.shared):
        begin(each, how_made(size))
    found = {"sft": experiment.once("sft", lambda: make_sft(experiment, train))}
    for name in ("base", "few-shot", "sft"):
        found[f"answers-{name}"] = evaluate(experiment, name)
    found["rewards"] = experiment.once("rewards", lambda: make_rewards(experiment, train))
    found["scores-sft"] = experiment.once("scores-sft", lambda: score_answers(experiment))
    for name in variants:
        found[name] = experiment.once(name, lambda: optimise(experiment, train, name, size.ppo))  # noqa: B023
        found[f"answers-{name}"] = evaluate(experiment, name)
    found["tax-base"] = once(experiment.shared, "tax-base", lambda: tax(lab.base, size))
    for name in ("sft", *variants):
        found[f"tax-{name}"] = experiment.once(f"tax-{name}", lambda: tax(folder / name, size))  # noqa: B023
    return found


def how_made(size: Size) -> str:
    """Returns the size and the settings, on which every stage depends besides the code, the name and the seed."""
    return "\n".join(map(repr, (size, REWARD_MODEL, short_name(compute_dtype(training_device())))))


def tax(folder: Path, size: Size) -> dict[str, Any]:
    """Returns the WikiText-2 loss, window by window, and the HellaSwag hits, item by item."""
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    loss = wikitext_loss(model, tokenizer, read_wikitext("test"), size.tax_tokens, TAX_WINDOW)
    hits = hellaswag_accuracy(model, tokenizer, read_hellaswag()[: size.tax_items])
    return {"wikitext": [round(value, 4) for value in loss.values], "hellaswag": [int(hit) for hit in hits.values]}
