"""Runs alignd's PPO on the job that bench.peers.ppo_trl describes, in a process of its own, for bench.ppo.

    python -m bench.ppo_ours JOB UPDATES SHARED_LAYERS

Writes the same lines to UPDATES as the peer does, with the seconds of each part added. SHARED_LAYERS lower layers are
frozen and shared by all models, and the value model is a head. With 0, all layers of policy and value model are
trained, as the peer's are.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from bench.peers.measure import peak_rss_mib
from policies.end_tokens import end_tokens
from training.config import PpoConfig, RewardModelConfig
from training.models.policy import SharedLayers, load_model
from training.models.reward import RewardModel
from training.ppo import rounds as ppo
from training.ppo.learner import load_policy, make_learner
from training.ppo.rollouts import RolloutEngine

_KV_CACHE_MIB = 256
_NO_LIMIT = 1e9


def main() -> None:
    """Runs the job named by the first argument, and writes to the second."""
    job_path, updates_path, shared_layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    job = json.loads(job_path.read_text())
    torch.set_num_threads(job["threads"])
    model, num_layers = Path(job["model"]), AutoConfig.from_pretrained(job["model"]).num_hidden_layers
    config = _ppo_config(job, shared_layers)
    engine = RolloutEngine(
        model,
        max_model_len=max(map(len, job["prompts"])) + job["response_tokens"],
        max_num_seqs=job["batch"],
        kv_cache_mib=_KV_CACHE_MIB,
        end_token_ids=end_tokens(AutoTokenizer.from_pretrained(job["model"])).token_ids,
        seed=job["seed"],
    )
    shared = SharedLayers(load_model(model))
    rewards = _reward_model(shared, Path(job["score_head"]), num_layers, 0)
    # The peer trains a whole value model; the recipe as shipped trains a head on the layers that all models share.
    value_start = rewards if shared_layers else _reward_model(shared, Path(job["score_head"]), num_layers, num_layers)
    policy = load_policy(model, shared, config)
    learner = make_learner(policy, value_start, rewards, config)
    updates, clock = itertools.count(1), _Stopwatch()

    def log(index: int, count: int, metrics: dict[str, Any]) -> None:
        line = {
            "update": next(updates),
            "seconds": clock.lap(),
            "score": metrics["objective/score"],
            "kl": metrics["objective/kl"],
            "ended": round(metrics["completion/eos_rate"] * job["batch"]),
            "peak_rss_mib": peak_rss_mib(),
            "length": metrics["completion/length"],
            "sampler_gap": metrics["rollout/sampler_gap"],
            **{name: value for name, value in metrics.items() if name.startswith("seconds/")},
        }
        with updates_path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    hooks = ppo.PpoHooks(
        prompts=[tuple(prompt) for prompt in job["prompts"]],
        draw=engine.draw,
        log=log,
    )
    updates_path.unlink(missing_ok=True)
    clock.lap()
    ppo.train(learner, config, hooks, seed=job["seed"])


class _Stopwatch:
    """Seconds from one lap to the next."""

    def __init__(self) -> None:
        self.began_at = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last lap."""
        ended_at = time.perf_counter()
        seconds, self.began_at = ended_at - self.began_at, ended_at
        return seconds


def _ppo_config(job: dict[str, Any], shared_layers: int) -> PpoConfig:
    """Returns the job as our settings. The peer clips no gradients and no scores, and never stops itself."""
    return PpoConfig(
        num_rounds=job["num_updates"],
        prompts_per_round=job["batch"],
        rollouts_per_prompt=1,
        max_tokens=job["response_tokens"],
        num_epochs=job["num_ppo_epochs"],
        num_minibatches=job["num_mini_batches"],
        num_frozen_layers=shared_layers,
        learning_rate=job["learning_rate"],
        value_learning_rate=job["learning_rate"],
        num_warmup_rounds=0,
        num_decay_rounds=0,
        kl_coef=job["kl_coef"],
        missing_eos_penalty=job["missing_eos_penalty"] or 0.0,
        score_clip=_NO_LIMIT,
        gamma=job["gamma"],
        gae_lambda=job["lam"],
        clip_range=job["cliprange"],
        value_clip_range=job["cliprange"],
        value_coef=job["vf_coef"],
        max_grad_norm=_NO_LIMIT,
        max_kl=_NO_LIMIT,
        max_sampler_gap=_NO_LIMIT,
        max_held_out_drop=_NO_LIMIT,
    )


def _reward_model(shared: SharedLayers, head: Path, num_layers: int, num_trained_layers: int) -> RewardModel:
    """Returns the job's score: linear in the normed hidden state at the last token, not in the mean beside it."""
    model = RewardModel(shared, RewardModelConfig(num_layers=num_layers, num_trained_layers=num_trained_layers))
    weight_D = load_file(head)["score.weight"][0].float()
    with torch.no_grad():
        model.heads_FE.zero_()
        model.heads_FE[: len(weight_D)] = weight_D[:, None]
    return model


if __name__ == "__main__":
    main()
