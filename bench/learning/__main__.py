"""Does it learn? HH-RLHF, InstructGPT in miniature, alignment tax, over-optimisation, and what being online is worth.

    python -m bench.learning --json FILE [--quick] [--seeds 3] [--only NAME ... | --report]

`--quick` runs one seed of one utility in miniature: it shows that everything works, and proves nothing about learning.
It leaves out online-0, which `--quick --only online-0` runs. The full benchmark takes hours, and can be stopped and
resumed: finished stages lie in var/bench/learning, finished experiments (chat-0, plain-2, online-1, human ...) in
docs/results/learning, with what they ran on. An experiment whose file is removed runs again. Experiments
factor-NAME-SEED (bench/learning/factors.py), which change one thing of the recipe, run only where `--only` names them,
after chat-SEED. With `--only`, several processes or machines can share the experiments; a run without it then reports
them all in docs/results/learning.md. `--report` runs nothing: it reports the experiments that are there, and says which
are missing.
"""

import argparse
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.learning.experiment import FULL, QUICK, Experiment, Size
from bench.learning.factors import FACTOR, FACTORS, try_factor
from bench.learning.figures import figures_of
from bench.learning.human import HUMAN_FULL, HUMAN_QUICK, HumanSize, human_preferences
from bench.learning.instruct import run_experiment
from bench.learning.lab import Lab
from bench.learning.online import ONLINE_FULL, ONLINE_QUICK, OnlineSize, run_online
from bench.learning.page import write_page
from bench.learning.stages import once
from bench.result import add_arguments, bench_result, report
from deploy.machine import machine, versions
from deploy.models import prepare_smollm2
from deploy.simulation.utility import load_utility
from policies.end_tokens import end_tokens
from policies.precision import compute_dtype, short_name
from training.models.device import training_device
from training.ppo.rollouts import RolloutEngine

_ROOT = Path(__file__).resolve().parents[2]
_WORK = _ROOT / "var" / "bench" / "learning"
_RESULTS = _ROOT / "docs" / "results"
_UTILITIES = {
    "chat": "deploy.simulation.utility:chat_utility",
    "plain": "bench.learning.second_utility:plain_utility",
}
_MAX_TOKENS, _MAX_MODEL_LEN, _MAX_NUM_SEQS, _KV_CACHE_MIB = 64, 1024, 64, 512

_Jobs = dict[str, Callable[[], dict[str, Any]]]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each experiment")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", nargs="+", metavar="NAME", help="run these experiments, and report nothing yet")
    some.add_argument("--report", action="store_true", help="run nothing, and report the experiments that are there")
    arguments = parser.parse_args()
    kept = _WORK / "quick" if arguments.quick else _RESULTS / "learning"
    if arguments.quick:
        jobs = _make_jobs(_WORK / "quick", kept, (QUICK, HUMAN_QUICK, ONLINE_QUICK), 1, ["chat"])
    else:
        jobs = _make_jobs(_WORK / "full", kept, (FULL, HUMAN_FULL, ONLINE_FULL), arguments.seeds, list(_UTILITIES))
    unknown = sorted(set(arguments.only or []) - set(jobs))
    if unknown:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(jobs)}")
    there = [name for name in jobs if (kept / f"{name}.json").exists()]
    on_request = (FACTOR, "online-") if arguments.quick else (FACTOR,)
    usual = [name for name in jobs if name in there or not name.startswith(on_request)]
    found = {name: jobs[name]() for name in (there if arguments.report else arguments.only or usual)}
    if arguments.only:
        return
    by_experiment = gathered(found)
    result = bench_result("learning", figures_of(by_experiment))
    report(result, arguments.json)
    if not arguments.quick:
        write_page(by_experiment, found, result, _RESULTS, missing=sorted(set(usual) - set(found)))


def _make_jobs(
    work: Path, results: Path, sizes: tuple[Size, HumanSize, OnlineSize], seeds: int, utilities: list[str]
) -> _Jobs:
    """Returns the experiments by name. Each leaves its result in `results`, and its stages' results in `work`."""
    size, human_size, online_size = sizes
    base = prepare_smollm2(_WORK / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(base)

    @functools.cache
    def engine() -> RolloutEngine:
        return RolloutEngine(
            base,
            max_model_len=_MAX_MODEL_LEN,
            max_num_seqs=_MAX_NUM_SEQS,
            kv_cache_mib=_KV_CACHE_MIB,
            end_token_ids=end_tokens(tokenizer).token_ids,
            seed=0,
        )

    def experiment(name: str, seed: int, utility: str) -> Experiment:
        lab = Lab(engine(), tokenizer, base, load_utility(_UTILITIES[utility]), _MAX_TOKENS, seed)
        return Experiment(lab, size, work / f"{name}-{seed}", work / "shared")

    def run(name: str, seed: int) -> dict[str, Any]:
        return run_experiment(experiment(name, seed, name))

    def online(seed: int) -> dict[str, Any]:
        return run_online(experiment("online", seed, "chat"), experiment("chat", seed, "chat"), online_size)

    def of_factor(factor: str, seed: int) -> dict[str, Any]:
        return try_factor(experiment("chat", seed, "chat"), factor)

    jobs: _Jobs = {f"{name}-{seed}": functools.partial(run, name, seed) for name in utilities for seed in range(seeds)}
    jobs |= {f"online-{seed}": functools.partial(online, seed) for seed in range(seeds)}
    for factor in FACTORS:
        for seed in range(seeds):
            jobs[f"{FACTOR}{factor}-{seed}"] = functools.partial(of_factor, factor, seed)
    jobs["human"] = lambda: human_preferences(base, human_size, seeds, work / "human", _WORK / "human-features")
    return {
        name: functools.partial(once, results, name, functools.partial(_with_circumstances, job))
        for name, job in jobs.items()
    }


def _with_circumstances(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the job's result, and what it depends on besides its seed."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True)
    computes_in = short_name(compute_dtype(training_device()))
    on = {"commit": commit.stdout.strip(), "computes_in": computes_in, **machine(), **versions()}
    return job() | {"on": on}


def gathered(found: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the results by experiment, one entry a seed."""
    by_experiment: dict[str, list[dict[str, Any]]] = {}
    for name, each in sorted(found.items(), key=lambda item: item[0] != "human"):
        kind, _, seed = name.rpartition("-")
        if name == "human":
            by_experiment[name] = each["seeds"]
        else:
            by_experiment.setdefault(kind, []).append(each | {"seed": int(seed)})
    return by_experiment


if __name__ == "__main__":
    main()
