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

from feedback import heartbeat
from policies.precision import compute_dtype, dtype_name
from policies.vllm_settings import count_caches_as_free, cpu_options, prepare_cpu, whole_prefill
from training.models.device import training_device
from training.models.parallel import ALONE, Ranks

_GPU_OPTIONS: Mapping[str, Any] = {
    # What the engine takes is given by `kv_cache_mib`. This share of the GPU must be free all the same, by default most
    # of it, and a server may be there too.
    "gpu_memory_utilization": 0.01,
}


@dataclass(frozen=True)
class Rollout:
    """A completion, in tokens. Its last one is an end token if and only if it is `finished`: the policy ended it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The sampler's log-probability of each token, in nats."""
    finished: bool


def to_rows(drawn: Sequence[Sequence[Rollout]]) -> list[list[Any]]:
    """Returns the rollouts of each prompt in the form that is written as JSON."""
    return [[[list(each.token_ids), list(each.logprobs), each.finished] for each in rollouts] for rollouts in drawn]


def from_rows(rows: Sequence[Sequence[Any]]) -> list[list[Rollout]]:
    """Returns the rollouts that `to_rows` was given.

    A run that an earlier release began has written one rollout of each prompt, without a list of them.
    """
    lists = [[row] if row and isinstance(row[-1], bool) else row for row in rows]
    return [[Rollout(tuple(ids), tuple(logprobs), finished) for ids, logprobs, finished in row] for row in lists]


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
        end_token_ids: Sequence[int],
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self._end_token_ids = list(end_token_ids)
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
        from vllm.model_executor.model_loader import default_loader
        from vllm.utils import cpu_resource_utils

        _beat_for_each_tensor(default_loader)
        count_caches_as_free(cpu_resource_utils)
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
        step = self._llm.llm_engine.step

        def step_and_beat() -> Any:
            heartbeat.beat()
            return step()

        # All rollouts of a round are one call, which may take long; each step of it is progress.
        self._llm.llm_engine.step = step_and_beat  # type: ignore[method-assign]

    def draw(self, request: Request) -> list[list[Rollout]]:
        """Draws completions of each prompt at temperature 1, from the request's weights."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": heartbeat.each(request.weights)})
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
                stop_token_ids=self._end_token_ids,
                detokenize=False,
            )
            for index in range(len(request.prompts))
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in request.prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [[_rollout(completion) for completion in output.outputs] for output in outputs]


def _beat_for_each_tensor(loader: Any) -> None:
    """Makes vLLM's module that loads models show progress: a large model takes minutes to read."""
    read = loader.safetensors_weights_iterator
    loader.safetensors_weights_iterator = lambda *given, **options: heartbeat.each(read(*given, **options))


def _rollout(completion: object) -> Rollout:
    token_ids = tuple(completion.token_ids)  # type: ignore[attr-defined]
    entries = completion.logprobs  # type: ignore[attr-defined]
    logprobs = tuple(entry[token].logprob for entry, token in zip(entries, token_ids, strict=True))
    return Rollout(token_ids, logprobs, completion.finish_reason == "stop")  # type: ignore[attr-defined]
