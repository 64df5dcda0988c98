"""Draws completions from the policy that is being trained, with vLLM inside the trainer's process.

Rollouts are drawn at temperature 1 with no top-p, top-k or penalty: what is learned from is the policy itself. The
engine takes new weights in place, from memory, and forgets its prefix cache with the old ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from policies.precision import compute_dtype, dtype_name
from training.models.device import training_device
from training.models.parallel import ALONE, Ranks

# vLLM reads these when it is imported. Its engine runs in this process, so that weights need no copy and no file, and
# must not pin it to some of the cores. Threads that wait give the core up instead of spinning: others want it.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_NO_USAGE_STATS": "1",
}

MAX_BATCHED_TOKENS = 4096
CPU_OPTIONS: Mapping[str, Any] = {
    # Completions of a prompt share its whole blocks of the KV cache. vLLM's 128 tokens are more than most prompts have;
    # 32 is the least it takes on a CPU.
    "block_size": 32,
}
GPU_OPTIONS: Mapping[str, Any] = {
    # What the engine takes is given by `kv_cache_mib`. This share of the GPU must be free all the same, by default most
    # of it, and a server may be there too.
    "gpu_memory_utilization": 0.01,
}


@dataclass(frozen=True)
class Rollout:
    """A completion, in tokens. One that was ended by the policy has its end token, in `finished` ones alone."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The sampler's log-probability of each token, in nats."""
    finished: bool


class RolloutEngine:
    """A vLLM engine whose weights can be replaced. Each of several ranks has one of its own, and all start theirs."""

    def __init__(
        self,
        model_path: Path,
        *,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_mib: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # Models come from folders. Only who names a data set of the hub wants it, and says so by setting this to 0.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm import LLM

        self._llm = LLM(
            model=str(model_path),
            dtype=dtype_name(compute_dtype(training_device())),
            # Compiling takes longer than all rollouts of a short run.
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=kv_cache_mib << 20,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            generation_config="vllm",
            # vLLM 0.32 dies on a CPU when the prompt of a request with a seed is prefilled in chunks.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(MAX_BATCHED_TOKENS, max_model_len),
            seed=seed,
            # Among several ranks vLLM must take the place that torchrun gave it, and not set out to make its own.
            distributed_executor_backend="external_launcher" if ranks.size > 1 else None,
            **(GPU_OPTIONS if training_device().type == "cuda" else CPU_OPTIONS),
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights, by the names of the checkpoint, one at a time, and empties the prefix cache."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.reset_prefix_cache()

    def sample(
        self, prompts: Sequence[Sequence[int]], *, num_completions: int, max_tokens: int, seed: int, eos_token_id: int
    ) -> list[list[Rollout]]:
        """Draws completions of each prompt at temperature 1. The same seed and weights draw the same."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        parameters = [
            SamplingParams(
                n=num_completions,
                temperature=1.0,
                max_tokens=max_tokens,
                # vLLM gives the completions of a prompt the seeds that follow.
                seed=seed + index * num_completions,
                logprobs=0,
                stop_token_ids=[eos_token_id],
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [[_rollout(completion) for completion in output.outputs] for output in outputs]


def _rollout(completion: object) -> Rollout:
    token_ids = tuple(completion.token_ids)  # type: ignore[attr-defined]
    entries = completion.logprobs  # type: ignore[attr-defined]
    logprobs = tuple(entry[token].logprob for entry, token in zip(entries, token_ids, strict=True))
    return Rollout(token_ids, logprobs, completion.finish_reason == "stop")  # type: ignore[attr-defined]
