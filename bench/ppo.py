"""PPO against TRL 1.12's PPOTrainer, the last release that has one: episodes a second for the same work, side by side.

    python -m bench.ppo --json FILE [--quick]

Both sides get the same prompts, lengths, batch, epochs, score and optimizer, and run in turns, each in a process of
its own. `whole` is ours with all layers of policy and value model trained, as TRL's are; `shared` is the recipe as
shipped, with two thirds of the layers frozen and shared by all models, and a value model that is a head: less work.
Both keep trained weights in fp32. Where passes compute in bf16, ours casts them once an optimizer step, at random
(training.models.masters), and the engine draws with the same cast; TRL's autocast casts them to the nearest in each
pass, and it draws in fp32. `--quick` takes a tiny random model, and shows only that it runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from bench.peers.environment import VENV, run_trl_ppo, trl_python
from bench.result import Figure, add_arguments, at_least, bench_result, report, spread, times_as_fast
from bench.roofs import CPU_DTYPE, matmul_roof, roofs
from deploy.models import make_tiny_llama, prepare_smollm2
from deploy.simulation.prompts import load_prompts
from policies.precision import short_name
from training.ppo.learner import ADAM_BETAS, ADAM_EPS

_ROOT = Path(__file__).resolve().parent.parent
_BATCH, _RESPONSE_TOKENS, _NUM_EPOCHS = 16, 48, 4
_MAX_PROMPT_TOKENS = 64
_SPEED_GOALS, _ROOF_GOAL = {"whole": 1.7, "shared": 5.5}, 0.6
_SHARED_SHARE = 2 / 3

_Updates = list[dict[str, Any]]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--updates", type=int, default=4, help="updates of each run, of which the first warms up")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each side, in turns")
    arguments = parser.parse_args()
    updates, seeds = (2, 1) if arguments.quick else (arguments.updates, arguments.seeds)
    measured = roofs()
    trl_python(VENV)
    with tempfile.TemporaryDirectory() as scratch:
        sides, job = _run_sides(Path(scratch), arguments.quick, updates, seeds)
        figures = [*measured, *_compare(sides, job, roof=matmul_roof(measured))]
    report(bench_result("ppo", figures), arguments.json)


def _run_sides(
    scratch: Path, quick: bool, num_updates: int, num_seeds: int
) -> tuple[dict[str, _Updates], dict[str, Any]]:
    """Runs each side in turn, with one seed after the other; the first update of a process warms it up."""
    model = make_tiny_llama(scratch / "model") if quick else prepare_smollm2(scratch / "model")
    num_layers = AutoConfig.from_pretrained(model).num_hidden_layers
    job = _make_job(model, scratch / "score.safetensors", num_updates)
    run: dict[str, Callable[[dict[str, Any], Path], _Updates]] = {
        "TRL": run_trl_ppo,
        "whole": lambda job, folder: _run_ours(job, folder, 0),
        "shared": lambda job, folder: _run_ours(job, folder, round(num_layers * _SHARED_SHARE)),
    }
    sides: dict[str, _Updates] = {name: [] for name in run}
    for seed in range(num_seeds):
        for name, run_side in run.items():
            updates = run_side({**job, "seed": seed}, scratch / f"{name}-{seed}")
            print(f"{name}, seed {seed}: {statistics.median(u['seconds'] for u in updates[1:]):.1f} s an update")
            sides[name] += updates[1:]
    return sides, job


def _make_job(model: Path, head: Path, num_updates: int) -> dict[str, Any]:
    """Returns what both sides run. The score is a random direction of the hidden state, of about unit variance."""
    width = AutoConfig.from_pretrained(model).hidden_size
    generator = torch.Generator().manual_seed(0)
    save_file({"score.weight": torch.randn(1, width, generator=generator) / width**0.5}, head)
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in load_prompts("train")
    )
    return {
        "model": str(model), "score_head": str(head),
        "prompts": [chat for chat in chats if len(chat) <= _MAX_PROMPT_TOKENS][: _BATCH * num_updates],
        "num_updates": num_updates, "batch": _BATCH, "response_tokens": _RESPONSE_TOKENS, "num_ppo_epochs": _NUM_EPOCHS,
        "num_mini_batches": 1, "learning_rate": 1e-5, "adam_beta2": ADAM_BETAS[1], "adam_eps": ADAM_EPS,
        "kl_coef": 0.05, "cliprange": 0.2, "vf_coef": 0.1, "gamma": 1.0,
        "lam": 0.95, "missing_eos_penalty": None, "temperature": 1.0, "precision": short_name(CPU_DTYPE), "seed": 0,
        "threads": os.cpu_count() or 1,
    }  # fmt: skip


def _run_ours(job: dict[str, Any], folder: Path, shared_layers: int) -> _Updates:
    """Runs alignd's PPO in a process of its own, and returns what was measured of each update.

    Raises:
        RuntimeError: the process failed.
    """
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "bench.ppo_ours", str(folder / "job.json"), str(folder / "updates.jsonl")]
    done = subprocess.run([*command, str(shared_layers)], cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"alignd's PPO failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (folder / "updates.jsonl").read_text().splitlines()]


def _compare(sides: dict[str, _Updates], job: dict[str, Any], roof: Figure) -> list[Figure]:
    """Returns both sides' speeds, what the updates reached, and our share of the roof."""
    seconds = {name: [update["seconds"] for update in updates] for name, updates in sides.items()}
    peer = statistics.median(seconds["TRL"])
    figures = [spread(f"TRL: seconds an update of {job['batch']} episodes", "s", seconds["TRL"])]
    for name in ("whole", "shared"):
        figures.append(spread(f"{name}: seconds an update", "s", seconds[name], peer=peer))
        faster = times_as_fast(f"{name}: times as fast as TRL", seconds[name], seconds["TRL"])
        figures.append(at_least(_SPEED_GOALS[name], faster))
        episodes = [job["batch"] / each for each in seconds[name]]
        figures.append(spread(f"{name}: episodes a second", "1/s", episodes, peer=job["batch"] / peer))
        for part in ("rollouts", "scoring", "update"):
            figures.append(spread(f"{name}: {part}", "s", [each[f"seconds/{part}"] for each in sides[name]]))
        rates = [_update_gflop(job, each["length"], name == "shared") / each["seconds/update"] for each in sides[name]]
        figures.append(
            at_least(_ROOF_GOAL, spread(f"{name}: update, share of {roof.name}", "", [r / roof.value for r in rates]))
        )
        gaps = [each["sampler_gap"] for each in sides[name]]
        figures.append(spread(f"{name}: mean difference of the sampler's log-probabilities", "nats", gaps))
    for name, updates in sides.items():
        figures.append(spread(f"{name}: score", "", [update["score"] for update in updates]))
        figures.append(spread(f"{name}: KL", "nats", [update["kl"] for update in updates]))
        figures.append(Figure(f"{name}: peak memory", max(u["peak_rss_mib"] for u in updates) / 1024, "GiB"))
    return figures


def _update_gflop(job: dict[str, Any], mean_length: float, is_shared: bool) -> float:
    """Returns the GFLOP of one update's matrix products: 2 a parameter and token forward, 4 backward.

    Attention's own products are left out. Layers see prompts too. The output embedding sees completions alone and is
    frozen: 2 for logits, 2 for their slope.
    """
    config: Any = AutoConfig.from_pretrained(job["model"])
    width, head_width = config.hidden_size, config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads + config.num_key_value_heads
    layer = 2 * width * heads * head_width + 3 * width * config.intermediate_size
    trained = config.num_hidden_layers - (round(config.num_hidden_layers * _SHARED_SHARE) if is_shared else 0)
    completion_tokens = job["batch"] * mean_length
    tokens = completion_tokens + sum(map(len, job["prompts"])) / len(job["prompts"]) * job["batch"]
    layers = (1 if is_shared else 2) * trained * layer * tokens
    flop = 6 * layers + 4 * config.vocab_size * width * completion_tokens
    return float(job["num_ppo_epochs"] * flop / 1e9)


if __name__ == "__main__":
    main()
