"""Draws completions from the policy that is being trained, with vLLM inside the trainer's process.

Rollouts are drawn at temperature 1 with no top-p, top-k or penalty, so that they come from the policy itself. Each
request has the weights to draw from, which replace the engine's in place. So no request draws from the weights of an
earlier one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from policies.precision import compute_dtype, dtype_name
from policies.vllm_settings import cpu_options, prepare_cpu, whole_prefill
from training.models.device import training_device
from training.models.parallel import ALONE, Ranks

_GPU_OPTIONS: Mapping[str, Any] = {
    # What the engine takes is given by `kv_cache_mib`. This share of the GPU must be free all the same, by default most
    # of it, and a server may be there too.
    "gpu_memory_utilization": 0.01,
}


@dataclass(frozen=True)
class Rollout:
    """A completion, in tokens. It has an end token if and only if it is `finished`: the policy ended it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The sampler's log-probability of each token, in nats."""
    finished: bool


def to_row(rollout: Rollout) -> list[Any]:
    """Returns a rollout in the form that is written as JSON."""
    return [list(rollout.token_ids), list(rollout.logprobs), rollout.finished]


def from_row(row: Sequence[Any]) -> Rollout:
    """Returns the rollout that `to_row` was given."""
    token_ids, logprobs, finished = row
    return Rollout(tuple(token_ids), tuple(logprobs), finished)


@dataclass(frozen=True)
class Request:
    """Completions to draw, and the policy to draw them from."""

    weights: Iterable[tuple[str, Tensor]]
    """The whole policy by the names of its checkpoint, one tensor at a time."""
    prompts: Sequence[Sequence[int]]
    num_completions: int
    """Of each prompt."""
    max_tokens: int
    """Of each completion."""
    seed: int
    """Seed of the first completion; each completion after it has the next seed."""


Draw = Callable[[Request], list[list[Rollout]]]
"""Draws completions of each prompt, the same for the same weights and seed."""


class RolloutEngine:
    """A vLLM engine whose weights can be replaced. Each of several ranks has its own, and all must start theirs."""

    def __init__(
        self,
        model_path: Path,
        *,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_mib: int,
        eos_token_id: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self._eos_token_id = eos_token_id
        on_gpu = training_device().type == "cuda"
        # In this process on either device, so that weights need no copy and no file.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        if not on_gpu:
            prepare_cpu()
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
            seed=seed,
            # Among several ranks vLLM must take the place that torchrun gave it, and not set out to make its own.
            distributed_executor_backend="external_launcher" if ranks.size > 1 else None,
            **({**_GPU_OPTIONS, **whole_prefill(max_model_len)} if on_gpu else cpu_options(max_model_len)),
        )

    def draw(self, request: Request) -> list[list[Rollout]]:
        """Draws completions of each prompt at temperature 1, from the request's weights."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(request.weights)})
        # What was computed with the weights before must not be read again.
        self._llm.reset_prefix_cache()
        parameters = [
            SamplingParams(
                n=request.num_completions,
                temperature=1.0,
                max_tokens=request.max_tokens,
                # vLLM gives the completions of a prompt the seeds that follow.
                seed=request.seed + index * request.num_completions,
                logprobs=0,
                stop_token_ids=[self._eos_token_id],
                detokenize=False,
            )
            for index in range(len(request.prompts))
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in request.prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [[_rollout(completion) for completion in output.outputs] for output in outputs]


def _rollout(completion: object) -> Rollout:
    token_ids = tuple(completion.token_ids)  # type: ignore[attr-defined]
    entries = completion.logprobs  # type: ignore[attr-defined]
    logprobs = tuple(entry[token].logprob for entry, token in zip(entries, token_ids, strict=True))
    return Rollout(token_ids, logprobs, completion.finish_reason == "stop")  # type: ignore[attr-defined]
