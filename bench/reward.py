"""The reward model against TRL's RewardTrainer on the same rankings of HH-RLHF-length text: groups a second, by K.

    python -m bench.reward --json FILE [--quick]

Both train all layers of SmolLM2, and no embeddings, in what training computes in here, one ranking of K completions an
optimizer step. TRL reads a ranking expanded into its K (K - 1) / 2 pairs, as all open trainers do; ours reads the
prompt once and each completion once. The 36 pairs of K = 9 at once would take TRL more than 24 GiB, so it takes at most
12 and accumulates. Both run in turns in this process. `--quick` takes a tiny random model, and shows only that it runs.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from bench.learning.hh_rlhf import as_group, read_comparisons
from bench.result import Figure, add_arguments, at_least, bench_result, report, spread, times_as_fast
from bench.roofs import CPU_DTYPE, roofs
from deploy.models import make_tiny_llama, prepare_smollm2
from feedback.store.comparisons import comparisons
from training.config import RewardModelConfig
from training.data.groups import RankedExample
from training.models.policy import SharedLayers, load_model
from training.models.reward import RewardModel
from training.rewards.fit import fit, shuffled_batches

_KS = (4, 6, 9)
_MAX_PROMPT_TOKENS, _MAX_COMPLETION_TOKENS = 256, 128
MAX_TRL_BATCH = 12
_SEED = 0


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rankings", type=int, default=4, help="rankings a run, of which the first warms up")
    arguments = parser.parse_args()
    figures = roofs()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_tiny_llama(folder / "model") if arguments.quick else prepare_smollm2(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(model)
        for k in _KS:
            examples = rankings(tokenizer, k, count=2 if arguments.quick else arguments.rankings)
            figures += _compare(k, examples, model, tokenizer, folder)
    report(bench_result("reward", figures), arguments.json)


def rankings(tokenizer: PreTrainedTokenizerBase, k: int, count: int) -> list[RankedExample]:
    """Returns rankings of K completions each: real prompts, with answers to them and to others, in random order.

    What is ranked has no influence on the time. Lengths do, and are those of HH-RLHF.
    """
    drawn = random.Random(k)
    found = drawn.sample(read_comparisons(("helpful-base",)).comparisons, count * k)
    examples = []
    for index in range(count):
        answers = [found[index].chosen, found[index].rejected]
        answers += [other.chosen for other in found[count + index * (k - 2) : count + (index + 1) * (k - 2)]]
        group = as_group(
            tokenizer, found[index].prompt, answers,
            max_prompt_tokens=_MAX_PROMPT_TOKENS, max_completion_tokens=_MAX_COMPLETION_TOKENS,
        )  # fmt: skip
        examples.append(RankedExample(group, tuple(drawn.sample(range(k), k)), f"l{index}", index))
    return examples


def _compare(
    k: int, examples: Sequence[RankedExample], model: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[Figure]:
    """Measures both sides on these rankings, in turns; the first step of each run warms up and does not count."""
    # TRL gets the rankings in the order in which ours takes them, so that the same ones count on both sides.
    in_turn = [examples[index] for (index,) in shuffled_batches([len(each.group) for each in examples], 1, _SEED)]
    ours, peer = [], []
    for _ in range(2):
        ours += _run_ours(examples, model)
        peer += _run_trl(in_turn, model, tokenizer, folder)
    rates, peer_rates = ([1 / seconds for seconds in side] for side in (ours, peer))
    shared = sum(len(example.group) for example in examples)
    prompts = [len(example.group.prompt) for example in examples]
    pairs = [
        len(prompt) + len(group.completions[side])
        for example in examples
        for group, prompt in [(example.group, example.group.prompt)]
        for pair in comparisons(example.ranks)
        for side in pair
    ]
    return [
        spread(f"K={k}: groups a second", "1/s", rates, peer=statistics.median(peer_rates)),
        at_least(k - 1, times_as_fast(f"K={k}: times as fast as TRL", ours, peer)),
        Figure(f"K={k}: tokens a group", shared / len(examples), "tokens", peer=sum(pairs) / len(examples)),
        Figure(f"K={k}: share of prompt in one completion's row", _prompt_share(examples, prompts), ""),
        Figure(f"K={k}: padding", 0.0, "share of tokens", peer=trl_padding(examples)),
    ]


def _prompt_share(examples: Sequence[RankedExample], prompts: Sequence[int]) -> float:
    k = len(examples[0].ranks)
    rows = sum(len(example.group) + (k - 1) * len(example.group.prompt) for example in examples)
    return k * sum(prompts) / rows


def trl_padding(examples: Sequence[RankedExample]) -> float:
    """Returns the share of padding in TRL's batches, each padded to its longest row."""
    real, padded = 0, 0
    for example in examples:
        lengths = [len(example.group.prompt) + len(each) for each in example.group.completions]
        pairs = comparisons(example.ranks)
        size = trl_batch(len(pairs))
        for start in range(0, len(pairs), size):
            rows = [lengths[side] for pair in pairs[start : start + size] for side in pair]
            real, padded = real + sum(rows), padded + max(rows) * len(rows)
    return 1 - real / padded


def trl_batch(num_pairs: int) -> int:
    """Returns how many pairs of a ranking TRL takes at a time, so that equal batches make up one optimizer step."""
    return max(size for size in range(1, MAX_TRL_BATCH + 1) if num_pairs % size == 0)


def _run_ours(examples: Sequence[RankedExample], model: Path) -> list[float]:
    """Returns the seconds of each optimizer step except the first."""
    shared = SharedLayers(load_model(model))
    config = RewardModelConfig(num_layers=shared.num_layers, num_trained_layers=shared.num_layers, batch_size=1)
    ended = []
    fit(
        RewardModel(shared, config), examples, config, seed=_SEED, warm=True,
        log=lambda step, num_steps, metrics: ended.append(time.perf_counter()),
    )  # fmt: skip
    return [after - before for before, after in itertools.pairwise(ended)]


def _run_trl(
    examples: Sequence[RankedExample], model: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[float]:
    """Returns the seconds of each optimizer step except the first, on the same rankings as pairs."""
    rows = [
        {
            "chosen_ids": [*example.group.prompt, *example.group.completions[chosen]],
            "rejected_ids": [*example.group.prompt, *example.group.completions[rejected]],
        }
        for example in examples
        for chosen, rejected in comparisons(example.ranks)
    ]
    num_pairs = len(rows) // len(examples)
    scored = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    scored.get_input_embeddings().requires_grad_(False)
    clock = _Clock()
    trainer = RewardTrainer(
        model=scored,
        args=RewardConfig(
            output_dir=str(folder / "trl"),
            num_train_epochs=1,
            # In the order given: each step has all pairs of one ranking.
            per_device_train_batch_size=trl_batch(num_pairs),
            gradient_accumulation_steps=num_pairs // trl_batch(num_pairs),
            train_sampling_strategy="sequential",
            max_length=None,
            bf16=CPU_DTYPE is torch.bfloat16,
            use_cpu=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return [after - before for before, after in itertools.pairwise(clock.ended)]


class _Clock(TrainerCallback):
    """Records when each step ends."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Records the time; called by the trainer."""
        self.ended.append(time.perf_counter())


if __name__ == "__main__":
    main()
