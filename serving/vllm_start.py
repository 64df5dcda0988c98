"""Starts vLLM on a model, with the settings of the server, and says why where that fails."""

import os
import resource
import signal
from pathlib import Path
from typing import Literal

from policies.encoding import EncodingError
from policies.end_tokens import EndTokenError
from policies.host_memory import host_memory
from policies.process_watch import Watch, ended_by
from policies.vllm_settings import MissingError, check_compiler, cpu_options, prepare_cpu
from serving.config import ServingConfig
from serving.context_length import max_model_len, too_long
from serving.vllm_engine import Engine, EngineError


def start_engine(folder: Path, config: ServingConfig) -> Engine:
    """Starts vLLM on the model in `folder`; takes ten seconds or more.

    Raises:
        EngineError: vLLM cannot start with this model and these settings on this machine.
        MissingError: something that vLLM needs of the machine is not there.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        _prepare(config, on_cpu)
        from vllm import AsyncEngineArgs
        from vllm.config import StructuredOutputsConfig
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise MissingError(f"vLLM cannot be loaded ({error}); `make setup` installs it") from error
    length = max_model_len(config, folder)
    arguments = AsyncEngineArgs(
        model=str(folder),
        # The same for all models, as the trainer loads it: vLLM reads some in ways of its own.
        tokenizer_mode="hf",
        dtype=_dtype(config, on_cpu),
        max_model_len=length,
        max_num_seqs=config.max_inflight_completions,
        enforce_eager=not config.compile,
        gpu_memory_utilization=config.gpu_memory_utilization,
        distributed_executor_backend="uni" if on_cpu else None,
        worker_extension_cls="serving.vllm_worker.EndsWithServer",
        enable_prefix_caching=True,
        kv_cache_memory_bytes=config.kv_cache_mib << 20 if on_cpu else None,
        # Temperature and the like are never the model's own. Its end tokens are read all the same.
        generation_config="vllm",
        # The others ignore what they do not keep of a JSON schema. By default, the first form decides for all.
        structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
        disable_log_stats=True,
        **(cpu_options(length) if on_cpu else {}),
    )
    watch = Watch()
    try:
        llm = AsyncLLM.from_engine_args(arguments)
    except Exception as error:
        # vLLM raises errors of many kinds here, some with several lines. Which of its processes have ended by then
        # differs from start to start, and would make the same failure look like another.
        words = " ".join(str(error).split()).partition(" Failed core proc(s)")[0]
        said = _killing(watch) or too_long(config, folder, str(error)) or words
        raise EngineError(f"vLLM did not start: {said}") from error
    try:
        return Engine(llm, length)
    except (EndTokenError, EncodingError) as error:
        llm.shutdown()
        raise EngineError(str(error)) from error


def _killing(watch: Watch) -> str:
    """Returns that the kernel has ended vLLM's process while it started, with its memory; "" if it has not."""
    if not watch.is_for_memory(-signal.SIGKILL):
        return ""
    # Nobody looked at it while it started, and of those that have ended, the kernel keeps the greatest.
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return f"it {ended_by(-signal.SIGKILL, peak, host_memory(), for_memory=True)}"


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
