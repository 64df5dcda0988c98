"""Proves by log-probabilities which weights an engine serves.

Those that the engine gives for the manifest's probes must match the trainer's, and must differ from those it gave with
the weights before.
"""

import math
import time
from dataclasses import dataclass

from alignd.v1.policy_manifest_pb2 import PolicyManifest
from serving.vllm_engine import Engine

WARM_UP_TOKENS = (0, 1)


class ProofError(Exception):
    """The engine does not serve the weights that it was asked to load."""


@dataclass(frozen=True)
class Proof:
    """The engine's log-probabilities of the probes, and how far they are from the trainer's, in nats."""

    logprobs: tuple[tuple[float, ...], ...]
    error: float


async def prove(engine: Engine, manifest: PolicyManifest, before: Proof | None, tolerance: float) -> Proof:
    """Returns the proof that `engine` serves the version of `manifest`.

    Args:
        engine: the engine, with nothing else in flight.
        manifest: the version that it should serve.
        before: what the previous, different weights gave for the same probes; None if there were none.
        tolerance: largest mean difference from the trainer's log-probabilities, in nats.

    Raises:
        ProofError: the log-probabilities differ from the trainer's, or do not differ from those of the version before.
    """
    if any(len(probe.logprobs) != len(probe.token_ids) - 1 for probe in manifest.probes):
        raise ProofError("a probe must have one log-probability for each of its tokens but the first")
    # A version that an earlier release imported has no probes. There is nothing to compare, but weights that are no
    # model's give no numbers.
    sound = [] if manifest.probes else await engine.logprobs(WARM_UP_TOKENS, f"sound-{time.time_ns()}")
    if not all(map(math.isfinite, sound)):
        raise ProofError("the engine gives log-probabilities that are not finite")
    served = await measure(engine, manifest)
    trained = [logprob for probe in manifest.probes for logprob in probe.logprobs]
    flat = [logprob for row in served for logprob in row]
    error = sum(abs(a - b) for a, b in zip(flat, trained, strict=True)) / len(flat) if flat else 0.0
    if not error <= tolerance:
        raise ProofError(
            f"served log-probabilities differ from the trainer's by {error:.4f} nats a token, more than "
            f"serving.probe_tolerance ({tolerance:g})"
        )
    if flat and before is not None and before.logprobs == served:
        raise ProofError("the engine still gives the log-probabilities of the version before")
    return Proof(served, error)


async def measure(engine: Engine, manifest: PolicyManifest) -> tuple[tuple[float, ...], ...]:
    """Returns the engine's log-probabilities of the manifest's probes."""
    rows = []
    for index, probe in enumerate(manifest.probes):
        rows.append(tuple(await engine.logprobs(probe.token_ids, f"probe-{manifest.version}-{index}-{time.time_ns()}")))
    return tuple(rows)
