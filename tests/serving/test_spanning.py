"""A swap that cannot wait: requests continue across it, marked, and the new version is live behind them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignd.v1.types_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, draw, long_request, ranking_request, sample_request, sampling
from tests.serving.processes import channel_of, end, environment, start, wait_serving
from tests.serving.rollout import get, new_version, promote, wait_served

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hasty")


@pytest.fixture(scope="module")
def hasty(folder: Path) -> Iterator[Stubs]:
    """A server whose swaps do not wait for requests."""
    settings = environment(folder, serving__drain_timeout_seconds=0)
    process = start("serve", settings)
    try:
        wait_serving(process, settings)
        with channel_of(settings) as channel:
            yield Stubs(channel)
    finally:
        process.terminate()
        end(process)


@pytest.mark.parametrize("seed", [None, 7], ids=["no seed", "a seed"])
def test_what_a_swap_overtakes_ends_and_says_so(hasty: Stubs, folder: Path, seed: int | None) -> None:
    _, manifest = new_version(hasty, folder / "var" / "policies")
    chosen = sampling(max_tokens=400) if seed is None else sampling(max_tokens=400, seed=seed)
    request = long_request(num_completions=8)
    request.sampling.CopyFrom(chosen)
    before = draw(hasty).completions[0].policy.version
    stream = hasty.inference.StreamSample(request, timeout=TIMEOUT_SECONDS)
    events, promoted_at = [], 0
    for event in stream:
        events.append(event)
        if event.WhichOneof("event") == "deltas" and not promoted_at:
            promoted_at = len(events)
            promote(hasty, manifest.version)
    sample = events[-1].finished
    assert len(sample.completions) == 8
    ended = {completion.finish_reason for completion in sample.completions}
    assert ended <= {FINISH_REASON_STOP, FINISH_REASON_LENGTH}
    written = {
        delta.index
        for event in events[promoted_at:]
        for delta in event.deltas.deltas
        if delta.text or delta.finish_reason
    }
    spanning = {completion.index for completion in sample.completions if completion.spans_swap}
    assert spanning
    assert spanning <= written, "what had ended before the swap does not span it"
    assert {completion.policy.version for completion in sample.completions} == {before}
    wait_served(hasty, manifest.version)
    assert get(hasty, manifest.version).history[-1].reason == "a test"
    after = draw(hasty).completions
    assert {(each.policy.version, each.spans_swap) for each in after} == {(manifest.version, False)}
    # Users may rank what they were shown; the store's reader leaves such completions out.
    hasty.feedback.SubmitRanking(ranking_request(sample), timeout=TIMEOUT_SECONDS)


def test_without_a_stream_only_what_the_swap_overtakes_spans_it(hasty: Stubs, folder: Path) -> None:
    """Its caller cannot tell what ended when, so the swap comes in the middle of the time that such a sample takes."""
    _, manifest = new_version(hasty, folder / "var" / "policies")
    # A stop string that is rare: some completions meet it soon, and some late.
    request = sample_request(num_completions=16, sampling=sampling(max_tokens=400, stop=["z"], seed=3))
    began_at = time.monotonic()
    hasty.inference.Sample(request, timeout=TIMEOUT_SECONDS)
    seconds = time.monotonic() - began_at
    sampled = hasty.inference.Sample.future(request, timeout=TIMEOUT_SECONDS)
    time.sleep(seconds / 3)
    promote(hasty, manifest.version)
    completions = sampled.result().completions
    spanning, whole = ([each.num_tokens for each in completions if each.spans_swap == side] for side in (True, False))
    assert spanning and whole
    assert max(whole) <= min(spanning), "all completions of a sample are drawn at the same pace"
    wait_served(hasty, manifest.version)
