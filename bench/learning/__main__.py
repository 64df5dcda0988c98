"""Does it learn? HH-RLHF, InstructGPT in miniature, alignment tax, over-optimisation, and the worth of being online.

    python -m bench.learning --json FILE [--quick] [--seeds 3]

`--quick` runs one seed of one utility in miniature, in under 20 minutes: it shows that all of it works, and is no
claim. The whole takes hours and can be stopped and gone on with: what is done lies in var/bench/learning. The results
and their plots go to docs/results/learning.md.
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.learning.figures import figures_of
from bench.learning.human import human_preferences
from bench.learning.instruct import FULL, QUICK, Experiment, Size, run_experiment
from bench.learning.lab import Lab
from bench.learning.page import write_page
from bench.result import add_arguments, bench_result, report
from deploy.models import prepare_smollm2
from deploy.simulation.utility import load_utility
from training.rollouts import RolloutEngine

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "var" / "bench" / "learning"
UTILITIES = {
    "chat": "deploy.simulation.utility:chat_utility",
    "plain": "bench.learning.second_utility:plain_utility",
}
MAX_TOKENS, MAX_MODEL_LEN, MAX_NUM_SEQS, KV_CACHE_MIB = 64, 1024, 64, 512
QUICK_HUMAN, FULL_HUMAN = (200, 100), (1700, 600)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each experiment")
    arguments = parser.parse_args()
    size, human_size, seeds = (QUICK, QUICK_HUMAN, 1) if arguments.quick else (FULL, FULL_HUMAN, arguments.seeds)
    work = WORK / ("quick" if arguments.quick else "full")
    found = run_all(work, size, human_size, seeds, list(UTILITIES)[: 1 if arguments.quick else None])
    result = bench_result("learning", figures_of(found))
    report(result, arguments.json)
    if not arguments.quick:
        write_page(found, result, ROOT / "docs" / "results")


def run_all(
    work: Path, size: Size, human_size: tuple[int, int], seeds: int, utilities: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """What was found, by experiment, one entry a seed."""
    base = prepare_smollm2(WORK / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(base)
    engine = RolloutEngine(
        base, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS, kv_cache_mib=KV_CACHE_MIB, seed=0
    )
    found: dict[str, list[dict[str, Any]]] = {"human": [], **{name: [] for name in utilities}}
    for seed in range(seeds):
        for name in utilities:
            lab = Lab(engine, tokenizer, base, load_utility(UTILITIES[name]), MAX_TOKENS, seed)
            experiment = Experiment(lab, size, work / f"{name}-{seed}")
            found[name].append(run_experiment(experiment))
            human = experiment.once("human", lambda: human_preferences(base, seed, *human_size))  # noqa: B023
        found["human"].append(human)
    return found


if __name__ == "__main__":
    main()
