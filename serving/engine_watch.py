"""Watches whether the engine makes progress: a process that is alive may not, such as one that was stopped."""

import asyncio
import time

from serving.vllm_engine import Engine, EngineError

_LOOK_SECONDS = 1.0
_PROBE_AFTER_SECONDS = 5.0
# Weights come from a disk that may be slow, and a GPU's first token may wait for kernels to be made.
_LONGEST_LOAD_SECONDS = 900.0
_LONGEST_FIRST_TOKEN_SECONDS = 300.0


async def watch(engine: Engine, timeout_seconds: float) -> None:
    """Returns never; fails when the engine is dead, or has made no token for `timeout_seconds`.

    Tokens of any request are progress. Where none come for some seconds, as when nobody asks, one is drawn as a probe.
    Loading weights may take longer, and so may the first token: they have limits of their own.

    Raises:
        EngineError: it is dead or hangs.
    """
    probe: asyncio.Task[None] | None = None
    num_probes = 0
    silent_seconds, looked_at = 0.0, time.monotonic()
    seen, was_loading = engine.num_tokens(), engine.loading
    try:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await engine.check_health()
            now = time.monotonic()
            # A look that comes late says that this process was held up, not that the engine was.
            silent_seconds += min(now - looked_at, 2 * _LOOK_SECONDS)
            looked_at = now
            tokens, loading = engine.num_tokens(), engine.loading
            if any(count > seen.get(name, 0) for name, count in tokens.items()) or was_loading is not loading:
                silent_seconds = 0.0
            seen, was_loading = tokens, loading
            if probe is not None and probe.done():
                probe.result()
                probe, silent_seconds = None, 0.0
            least = _LONGEST_LOAD_SECONDS if loading else 0.0 if engine.has_answered else _LONGEST_FIRST_TOKEN_SECONDS
            if silent_seconds > max(timeout_seconds, least):
                raise EngineError(f"vLLM hangs: it has made no token for {silent_seconds:.0f} s")
            if probe is None and silent_seconds >= min(_PROBE_AFTER_SECONDS, timeout_seconds / 2):
                num_probes += 1
                probe = asyncio.create_task(engine.probe(f"progress-{num_probes}"))
    finally:
        if probe is not None:
            probe.cancel()
