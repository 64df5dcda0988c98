"""What the loop costs: time from clone to first ranking, its stages, its swap, and what gRPC adds to the engine.

    python -m bench.loop --json FILE [--quick]

The benchmark clones this checkout into a new folder, runs `make demo` there and reads its report. Then it asks a server
and a bare engine with the same settings for the same completions, in turns. `--quick` does both with a tiny random
model.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from alignd.v1 import inference_service_pb2, inference_service_pb2_grpc, types_pb2
from bench.result import Figure, add_arguments, at_least, at_most, bench_result, report
from deploy.endings import cause
from deploy.models import make_tiny_llama, prepare_smollm2
from deploy.simulation.prompts import load_prompts
from deploy.up import free_port
from policies.rendering import prompt_token_ids
from serving.config import ServingConfig
from serving.drawing import Draw
from serving.vllm_engine import Engine
from serving.vllm_start import start_engine

_ROOT = Path(__file__).resolve().parent.parent
_NUM_COMPLETIONS = 4
_MAX_TOKENS = 64
_CONCURRENCY = 8
_START_TIMEOUT_SECONDS = 300.0
_POLL_SECONDS = 0.5
# Requests served while training and swapping may not fail; a swap may hold new ones up for this long.
_SWAP_GOAL_SECONDS = 2.0
_OVERHEAD_GOAL = 0.03


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    figures = _demo_figures(arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        figures += asyncio.run(_overhead_figures(Path(folder), arguments.quick))
    report(bench_result("loop", figures), arguments.json)


def _demo_figures(quick: bool) -> list[Figure]:
    """Returns what `make demo` in a fresh clone took."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "alignd")
        began_at = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", str(_ROOT), str(clone)], check=True)
        cloned = time.monotonic() - began_at
        subprocess.run(
            ["make", "demo", *(["QUICK=1"] if quick else [])], cwd=clone, check=True, env=_outer_environment()
        )
        whole = time.monotonic() - began_at
        (path,) = clone.glob("var/demo-*/report.json")
        found = json.loads(path.read_text())
    figures = [
        at_most(
            120.0 if quick else 300.0, Figure("clone to first ranking", cloned + found["seconds_to_first_ranking"], "s")
        ),
        Figure("clone to report", whole, "s"),
        at_most(
            120.0 if quick else 900.0, Figure("demo after set-up", sum(s["seconds"] for s in found["stages"]), "s")
        ),
        *(Figure(f"stage: {stage['name']}", stage["seconds"], "s") for stage in found["stages"]),
        at_most(_SWAP_GOAL_SECONDS, Figure("swap: nothing admitted", found["swap"]["pause_seconds"], "s")),
        Figure("swap: old requests finish first", found["swap"]["drain_seconds"], "s"),
        at_most(0.0, Figure("requests failed", found["traffic"]["failed"], "requests")),
        Figure("samples served", found["traffic"]["samples_served"], "requests"),
    ]
    if quick:
        return figures  # a random model has nothing to learn from
    won = found["by_utility"]
    return [
        *figures,
        at_least(0.5, Figure("win rate by hidden utility", won["value"], "share", won["low"], won["high"])),
    ]


def _outer_environment() -> dict[str, str]:
    """Returns the environment without the variables that would make the clone's make believe it is part of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "VIRTUAL_ENV"))}


async def _overhead_figures(folder: Path, quick: bool) -> list[Figure]:
    """Returns the tokens per second of the server and of the bare engine, measured in turns, and the difference."""
    model = make_tiny_llama(folder / "model") if quick else prepare_smollm2(folder / "model")
    config = ServingConfig(initial_model=model, port=free_port("127.0.0.1"), max_model_len=512)
    prompts = load_prompts("train")[: _CONCURRENCY * (1 if quick else 2)]
    server = _start_server(config, folder)
    try:
        engine = await asyncio.to_thread(start_engine, model, config)
        address = f"{config.host}:{config.port}"
        async with grpc.aio.insecure_channel(address) as channel:
            await _until_serving(channel, server, folder / "serve.log")
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            sides: dict[str, Callable[[str, int], Awaitable[int]]] = {
                "gRPC": lambda prompt, seed: _ask_server(stub, prompt, seed),
                "bare": lambda prompt, seed: _ask_engine(engine, prompt, seed),
            }
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(2 if quick else 6):
                for name, ask in sides.items():
                    rate = await _tokens_per_second(ask, prompts, turn)
                    if turn:  # the first turn warms both up
                        rates[name].append(rate)
        engine.shutdown()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    return _compare(rates["gRPC"], rates["bare"])


def _compare(ours: list[float], bare: list[float]) -> list[Figure]:
    overhead = [1 - mine / other for mine, other in zip(ours, bare, strict=True)]
    middle = statistics.median(overhead)
    return [
        Figure(
            "tokens over gRPC", statistics.median(ours), "tokens/s", min(ours), max(ours), peer=statistics.median(bare)
        ),
        Figure("tokens from the bare engine", statistics.median(bare), "tokens/s", min(bare), max(bare)),
        at_most(_OVERHEAD_GOAL, Figure("overhead of gRPC", middle, "share", min(overhead), max(overhead))),
    ]


async def _tokens_per_second(ask: Callable[[str, int], Awaitable[int]], prompts: list[str], seed: int) -> float:
    """Returns the rate at which `ask` yields tokens with _CONCURRENCY requests in flight."""
    in_flight = asyncio.Semaphore(_CONCURRENCY)

    async def one(prompt: str) -> int:
        async with in_flight:
            return await ask(prompt, seed)

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return sum(counts) / (time.perf_counter() - started)


def _as_prompt(text: str) -> types_pb2.Prompt:
    return types_pb2.Prompt(chat=types_pb2.Chat(messages=[types_pb2.Message(role=types_pb2.ROLE_USER, content=text)]))


async def _ask_server(stub: Any, prompt: str, seed: int) -> int:
    """Returns how many tokens a Sample request gave."""
    request = inference_service_pb2.SampleRequest(
        user_id="bench",
        prompt=_as_prompt(prompt),
        num_completions=_NUM_COMPLETIONS,
        sampling=types_pb2.SamplingParams(max_tokens=_MAX_TOKENS, seed=seed),
    )
    response = await stub.Sample(request, timeout=_START_TIMEOUT_SECONDS)
    return sum(completion.num_tokens for completion in response.completions)


async def _ask_engine(engine: Engine, prompt: str, seed: int) -> int:
    """Returns how many tokens the same request gave without a server."""
    draw = Draw(_NUM_COMPLETIONS, temperature=1.0, top_p=1.0, max_tokens=_MAX_TOKENS, seed=seed)
    token_ids = prompt_token_ids(engine.tokenizer, _as_prompt(prompt))
    request_id = f"bench-{time.monotonic_ns()}"
    batches = [batch async for batch in engine.generate(request_id, token_ids, draw, "bench", stream=False)]
    return sum(len(delta.token_ids) for batch in batches for delta in batch)


def _start_server(config: ServingConfig, folder: Path) -> subprocess.Popen[bytes]:
    """Starts `alignd serve` with the settings of `config`."""
    settings = {
        "ALIGND_DATA_DIR": str(folder / "data"),
        "ALIGND_SERVING__INITIAL_MODEL": str(config.initial_model),
        "ALIGND_SERVING__PORT": str(config.port),
        "ALIGND_SERVING__MAX_MODEL_LEN": str(config.max_model_len),
    }
    with (folder / "serve.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "serve"], env={**os.environ, **settings}, stdout=log, stderr=log
        )


async def _until_serving(channel: grpc.aio.Channel, server: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until the server's health is SERVING.

    Raises:
        RuntimeError: the server ended instead; the text has the cause.
    """
    health: Any = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(_START_TIMEOUT_SECONDS):
        while server.poll() is None:
            with contextlib.suppress(grpc.aio.AioRpcError):
                response = await health.Check(health_pb2.HealthCheckRequest(), timeout=_POLL_SECONDS)
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_POLL_SECONDS)
    raise RuntimeError(f"`alignd serve` ended with {server.returncode}: {cause(log)}")


if __name__ == "__main__":
    main()
