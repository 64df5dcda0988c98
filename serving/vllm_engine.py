"""The engine: vLLM's AsyncLLM, with the few things that serving needs of it. The only module here that imports vLLM."""

import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignd.v1.types_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FINISH_REASON_UNSPECIFIED, FinishReason
from policies.vllm_settings import check_compiler, cpu_options, prepare_cpu
from serving.config import ServingConfig

_FINISH_REASONS: dict[str | None, FinishReason] = {
    None: FINISH_REASON_UNSPECIFIED,
    "stop": FINISH_REASON_STOP,
    "length": FINISH_REASON_LENGTH,
}
# vLLM gives each of a request's completions the seed after the last one's, and on a GPU keeps them in 63 bits.
_SEEDS = 2**62


class EngineError(Exception):
    """The engine cannot do what was asked, or is dead."""


@dataclass(frozen=True)
class Draw:
    """How completions are drawn; every value is decided."""

    num_completions: int
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Delta:
    """New text of one completion."""

    index: int
    text: str
    num_tokens: int
    finish_reason: FinishReason


class Engine:
    """One vLLM engine with one set of weights at a time."""

    def __init__(self, llm: Any, max_model_len: int) -> None:
        self._llm = llm
        self.max_model_len = max_model_len
        self.tokenizer = llm.get_tokenizer()

    async def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], draw: Draw, cache_salt: str, *, stream: bool
    ) -> AsyncIterator[list[Delta]]:
        """Yields new text as it is written, or, unless `stream`, once when all has been.

        Cancelling the iteration ends the generation. `cache_salt` keeps what was cached of different weights apart.

        Raises:
            EngineError: vLLM failed, or is dead.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Greedy completions of one prompt are all the same: one is written, and given as often as was asked.
        copies = draw.num_completions if draw.temperature == 0 else 1
        params = SamplingParams(
            n=draw.num_completions // copies,
            temperature=draw.temperature,
            top_p=draw.top_p,
            max_tokens=draw.max_tokens,
            stop=list(draw.stop) or None,
            seed=None if draw.seed is None else draw.seed % _SEEDS,
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": list(prompt_token_ids), "cache_salt": cache_salt}
        try:
            async for output in self._llm.generate(prompt, params, request_id):
                yield [
                    Delta(each.index + copy, each.text, len(each.token_ids), _FINISH_REASONS[each.finish_reason])
                    for each in output.outputs
                    for copy in range(copies)
                ]
        except KeyError as error:
            raise EngineError(f"vLLM ended a completion with {error}") from error
        except _vllm_errors() as error:
            raise EngineError(f"vLLM failed: {error}") from error

    async def logprobs(self, token_ids: Sequence[int], request_id: str) -> list[float]:
        """Returns the log-probability, in nats, of each token but the first, given those before it.

        Raises:
            EngineError: vLLM failed, or is dead.
        """
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        # A salt of its own, so that log-probabilities are computed and never read from a cache.
        prompt = {"prompt_token_ids": list(token_ids), "cache_salt": request_id}
        rows: Any = None
        try:
            async for output in self._llm.generate(prompt, params, request_id):
                rows = output.prompt_logprobs or rows
        except _vllm_errors() as error:
            raise EngineError(f"vLLM failed: {error}") from error
        if rows is None or len(rows) != len(token_ids):
            raise EngineError("vLLM returned no log-probabilities of the prompt")
        return [row[token].logprob for row, token in zip(rows[1:], token_ids[1:], strict=True)]

    async def load_weights(self, folder: Path) -> None:
        """Replaces the weights in place by those in `folder`, and drops everything computed from the old ones.

        Requests in flight pause and then continue with the new weights; the caller makes sure that there are none, or
        that they are marked.

        Raises:
            EngineError: the weights do not fit, or the engine is dead.
        """
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            try:
                await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                await self._llm.reset_prefix_cache(reset_running_requests=True)
            finally:
                await self._llm.resume_generation()
        except Exception as error:
            # vLLM passes whatever a worker raised on as a plain Exception.
            raise EngineError(f"vLLM could not load {folder.name}: {error}") from error

    async def check_health(self) -> None:
        """Checks that the engine is alive.

        Raises:
            EngineError: the engine is dead.
        """
        try:
            await self._llm.check_health()
        except _vllm_errors() as error:
            raise EngineError(f"vLLM is dead: {error}") from error

    def shutdown(self) -> None:
        """Ends the engine's processes."""
        self._llm.shutdown()


def _vllm_errors() -> tuple[type[Exception], ...]:
    """Returns what vLLM raises for failures of its own and, as ValueError, for input that it does not take."""
    from vllm.exceptions import VLLMError

    return VLLMError, ValueError


def start_engine(folder: Path, config: ServingConfig) -> Engine:
    """Starts vLLM on the model in `folder`; takes ten seconds or more.

    Raises:
        EngineError: vLLM cannot start with this model and these settings on this machine.
        MissingError: something that vLLM needs of the machine is not there.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    _prepare(config, on_cpu)
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(folder),
        dtype=_dtype(config, on_cpu),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_inflight_completions,
        enforce_eager=not config.compile,
        gpu_memory_utilization=config.gpu_memory_utilization,
        distributed_executor_backend="uni" if on_cpu else None,
        worker_extension_cls="serving.vllm_worker.EndsWithServer",
        enable_prefix_caching=True,
        kv_cache_memory_bytes=config.kv_cache_mib << 20 if on_cpu else None,
        generation_config="vllm",
        disable_log_stats=True,
        **(cpu_options(config.max_model_len) if on_cpu else {}),
    )
    try:
        return Engine(AsyncLLM.from_engine_args(arguments), config.max_model_len)
    except Exception as error:
        # vLLM raises errors of many kinds here, some with several lines.
        raise EngineError(f"vLLM did not start: {' '.join(str(error).split())}") from error


def try_model(folder: Path, config: ServingConfig) -> bool:
    """Loads a model as an engine would, except for its weights; returns whether its tokenizer has a chat template.

    It leaves vLLM in the calling process, which should end soon after.

    Raises:
        EngineError: no completions can be drawn from the model; the text says why.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import AutoTokenizer
    from vllm import AsyncEngineArgs

    try:
        model = AsyncEngineArgs(model=str(folder), max_model_len=config.max_model_len).create_model_config()
    except _vllm_errors() as error:
        raise EngineError(f"vLLM does not take it: {_first_sentence(str(error))}") from error
    if model.runner_type != "generate" or model.is_encoder_decoder:
        raise EngineError(f"{model.architectures[0]} is no model that continues a prompt (a causal language model)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # Any error: it depends on the contents of the user's files which one transformers raises.
        raise EngineError(f"its tokenizer does not load: {_first_sentence(str(error))}") from error
    return bool(tokenizer.chat_template)


def _first_sentence(text: str) -> str:
    """Returns the first sentence of an error, without pydantic's words before it and the advice after it."""
    said = text.partition("Value error, ")[2] or text
    return said.strip().split(". ")[0].splitlines()[0]


def _dtype(config: ServingConfig, on_cpu: bool) -> Literal["bfloat16", "float16", "float32"]:
    """Returns the configured precision, or else the one that the trainer computes in."""
    import torch

    from policies.precision import compute_dtype, dtype_name

    if config.dtype != "auto":
        return config.dtype
    return dtype_name(compute_dtype(torch.device("cpu" if on_cpu else "cuda")))


def _prepare(config: ServingConfig, on_cpu: bool) -> None:
    """Sets what the engine's process reads from the environment, and checks that the machine has what it needs.

    Raises:
        EngineError: compiling is set on a CPU.
        MissingError: something that vLLM needs of the machine is missing.
    """
    if not on_cpu:
        if config.compile:
            check_compiler()
        return
    if config.compile:
        raise EngineError("serving.compile is for a GPU: on a CPU nothing may need a compiler at run time")
    os.environ.setdefault("OMP_NUM_THREADS", str(config.num_threads or os.cpu_count() or 1))
    prepare_cpu()
