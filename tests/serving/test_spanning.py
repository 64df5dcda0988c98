"""A swap that cannot wait: requests continue across it, marked, and the new version is live behind them."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from alignd.v1.types_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, draw, long_request, ranking_request, sampling
from tests.serving.processes import address_of, end, environment, start, wait_serving
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
        with grpc.insecure_channel(address_of(settings)) as channel:
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
    events = []
    for event in stream:
        events.append(event)
        if sum(each.WhichOneof("event") == "deltas" for each in events) == 1:
            promote(hasty, manifest.version)
    sample = events[-1].finished
    assert len(sample.completions) == 8
    ended = {completion.finish_reason for completion in sample.completions}
    assert ended <= {FINISH_REASON_STOP, FINISH_REASON_LENGTH}
    spanning = [completion.spans_swap for completion in sample.completions]
    assert spanning == [True] * 8
    assert {completion.policy.version for completion in sample.completions} == {before}
    wait_served(hasty, manifest.version)
    assert get(hasty, manifest.version).history[-1].reason == "a test"
    after = draw(hasty).completions
    assert {(each.policy.version, each.spans_swap) for each in after} == {(manifest.version, False)}
    # Users may rank what they were shown; the store's reader leaves such completions out.
    hasty.feedback.SubmitRanking(ranking_request(sample), timeout=TIMEOUT_SECONDS)
