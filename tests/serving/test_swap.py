"""A new version goes live under load without a failed request and is proved; if it cannot be, it is rejected.

Each test leaves version 1 live.
"""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from alignd.v1.policy_manifest_pb2 import PolicyManifest
from alignd.v1.policy_service_pb2 import (
    REPLICA_STATE_DEGRADED,
    REPLICA_STATE_SERVING,
    STAGE_CANDIDATE,
    STAGE_LIVE,
    STAGE_REJECTED,
    STAGE_RETIRED,
    Policy,
    PromoteRequest,
    RollbackRequest,
    WatchRequest,
)
from policies.rendering import prompt_token_ids
from tests.serving import versions
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, chat, draw, refused, sample_request, sampling, texts
from tests.serving.processes import Server, wait_until
from tests.serving.rollout import (
    QUESTIONS,
    SWAP_SECONDS,
    flip_a_bit,
    get,
    live_version,
    load,
    new_version,
    promote,
    remove_all,
    replica,
    wait_served,
)
from tests.serving.versions import Weights, in_shards

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("version_1_again")]

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def served_texts(stubs: Stubs) -> list[str]:
    greedy = sampling(temperature=0, max_tokens=8)
    return [texts(draw(stubs, prompt=chat(each), num_completions=1, sampling=greedy))[0] for each in QUESTIONS]


def expected_texts(folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [prompt_token_ids(tokenizer, chat(each)) for each in QUESTIONS]
    return [versions.greedy_text(folder, token_ids, tokenizer, 8) for token_ids in prompts]


def test_a_swap_under_load_fails_nobody_and_serves_the_new_weights(stubs: Stubs, server: Server, root: Path) -> None:
    before = served_texts(stubs)
    path, manifest = new_version(stubs, root)
    with load(server) as callers:
        wait_until(lambda: len(callers.seen) > 100, SWAP_SECONDS, "load")
        assert promote(stubs, manifest.version, expected_live_version=1).stage == STAGE_LIVE
        wait_served(stubs, manifest.version)
        status = replica(stubs)
        new = (manifest.version, manifest.weight_digest)
        wait_until(lambda: callers.seen.count(new) > 100, SWAP_SECONDS, "load on the new version")
    old = (1, get(stubs, 1).manifest.weight_digest)
    assert set(callers.seen) == {old, new}
    assert status.pause_seconds < 10
    assert status.drain_seconds < 20
    assert status.probe_error < 0.05
    assert status.error_message == ""
    assert (get(stubs, 1).stage, get(stubs, manifest.version).stage) == (STAGE_RETIRED, STAGE_LIVE)
    after = served_texts(stubs)
    # Rounding in bf16 may turn a close choice of one token.
    assert sum(a == b for a, b in zip(after, expected_texts(path), strict=True)) >= 4
    assert not set(after) & set(before)


def test_a_rollback_under_load_serves_the_old_weights(stubs: Stubs, server: Server, root: Path) -> None:
    """The version between is in several files, as a large one is."""
    before = served_texts(stubs)
    path, manifest = new_version(stubs, root, change_files=in_shards)
    assert len(list(path.glob("*.safetensors"))) > 2
    promote(stubs, manifest.version)
    wait_served(stubs, manifest.version)
    refused(stubs.inference.Sample, sample_request(policy="v1"), PRECONDITION)
    with load(server) as callers:
        wait_until(lambda: len(callers.seen) > 50, SWAP_SECONDS, "load")
        rolled_back = stubs.policies.Rollback(
            RollbackRequest(actor="test", reason="users"), timeout=TIMEOUT_SECONDS
        ).policy
        wait_served(stubs, 1)
    assert (rolled_back.version, rolled_back.stage, rolled_back.history[-1].reason) == (1, STAGE_LIVE, "users")
    assert {version for version, _ in callers.seen} <= {1, manifest.version}
    assert get(stubs, manifest.version).stage == STAGE_RETIRED
    assert replica(stubs).pause_seconds < 10
    assert served_texts(stubs) == before


def test_versions_that_follow_fast_end_with_the_last(stubs: Stubs, server: Server, root: Path) -> None:
    made = [new_version(stubs, root)[1].version for _ in range(3)]
    with load(server) as callers:
        for version in made:
            promote(stubs, version)
        wait_served(stubs, made[-1])
    assert {version for version, _ in callers.seen} <= {1, *made}
    assert live_version(stubs) == made[-1]


def shift_logprobs(manifest: PolicyManifest) -> None:
    for probe in manifest.probes:
        probe.logprobs[:] = [logprob - 0.2 for logprob in probe.logprobs]


def name_an_unknown_token(manifest: PolicyManifest) -> None:
    manifest.probes[0].token_ids[3] = 1_000_000


def name_a_negative_token(manifest: PolicyManifest) -> None:
    manifest.probes[0].token_ids[3] = -5


def fill_the_context(manifest: PolicyManifest) -> None:
    manifest.probes[0].token_ids[:] = [5] * 512
    manifest.probes[0].logprobs[:] = [-1.0] * 511


def wait_rejected(stubs: Stubs, version: int) -> Policy:
    wait_until(lambda: get(stubs, version).stage == STAGE_REJECTED, SWAP_SECONDS, f"v{version} rejected")
    assert live_version(stubs) == 1
    wait_served(stubs, 1)
    wait_until(lambda: replica(stubs).state == REPLICA_STATE_SERVING, SWAP_SECONDS, "all is well")
    assert replica(stubs).error_message.startswith(f"v{version}: ")
    refused(stubs.policies.Promote, PromoteRequest(version=version, actor="a"), PRECONDITION)
    refused(stubs.policies.Rollback, RollbackRequest(version=version, actor="a"), PRECONDITION)
    return get(stubs, version)


@pytest.mark.parametrize(
    ("change_manifest", "why"),
    [
        (shift_logprobs, "differ from the trainer's"),
        (name_an_unknown_token, "vocabulary"),
        (name_a_negative_token, "vocabulary"),
        (fill_the_context, "tokens"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_version_that_is_not_proved_is_rejected_and_the_old_goes_on(
    stubs: Stubs, server: Server, root: Path, change_manifest: Callable[[PolicyManifest], None], why: str
) -> None:
    before = served_texts(stubs)
    _, manifest = new_version(stubs, root, change_manifest=change_manifest)
    with load(server) as callers:
        promote(stubs, manifest.version)
        rejected = wait_rejected(stubs, manifest.version)
        seen = len(callers.seen)
        wait_until(lambda: len(callers.seen) > seen + 20, SWAP_SECONDS, "load goes on")
    assert {version for version, _ in callers.seen} == {1}
    assert why in rejected.history[-1].reason
    assert rejected.history[-1].actor == "serving/serving-0"
    assert get(stubs, 1).stage == STAGE_LIVE
    assert served_texts(stubs) == before


def test_the_weights_of_another_version_do_not_pass_for_the_new_ones(stubs: Stubs, root: Path) -> None:
    def the_old_ones(weights: Weights) -> Weights:
        return load_file(root / "v1" / "model.safetensors")

    _, manifest = new_version(stubs, root, change=the_old_ones)
    promote(stubs, manifest.version)
    assert "differ from the trainer's" in wait_rejected(stubs, manifest.version).history[-1].reason


def test_what_is_damaged_after_registration_is_rejected(stubs: Stubs, server: Server, root: Path) -> None:
    path, manifest = new_version(stubs, root)
    flip_a_bit(path)
    with load(server) as callers:
        promote(stubs, manifest.version)
        rejected = wait_rejected(stubs, manifest.version)
    assert {version for version, _ in callers.seen} <= {1}
    assert "its files cannot be used" in rejected.history[-1].reason


def test_what_cannot_be_read_now_is_reported_tried_again_and_never_rejected(stubs: Stubs, root: Path) -> None:
    _, manifest = new_version(stubs, root)
    promote(stubs, manifest.version)
    wait_served(stubs, manifest.version)
    hidden = root.parent / "hidden"
    (root / "v1").rename(hidden)
    try:
        stubs.policies.Rollback(RollbackRequest(version=1, actor="test"), timeout=TIMEOUT_SECONDS)
        wait_until(lambda: replica(stubs).state == REPLICA_STATE_DEGRADED, SWAP_SECONDS, "said")
        said = replica(stubs)
        assert (said.policy.version, said.failed_version) == (manifest.version, 0)
        assert said.error_message.startswith("v1: its files cannot be read: ")
        assert {each.policy.version for each in draw(stubs).completions} == {manifest.version}
        assert get(stubs, 1).stage == STAGE_LIVE
    finally:
        hidden.rename(root / "v1")
    wait_served(stubs, 1)
    assert (replica(stubs).state, replica(stubs).error_message) == (REPLICA_STATE_SERVING, "")
    assert get(stubs, manifest.version).stage == STAGE_RETIRED


def test_a_watcher_hears_of_a_rejection_as_it_happens(stubs: Stubs, root: Path) -> None:
    past = stubs.policies.Watch(WatchRequest(), timeout=TIMEOUT_SECONDS)
    first = next(past)
    assert (first.revision, first.stage_change.version, first.stage_change.to_stage) == (1, 1, STAGE_CANDIDATE)
    path, manifest = new_version(stubs, root)
    flip_a_bit(path)
    promote(stubs, manifest.version)
    heard: list[tuple[int, int, str]] = []
    for event in past:
        change = event.stage_change
        if manifest.version in (change.version, event.replica_status.policy.version) or heard:
            heard.append((change.version, change.to_stage, event.replica_status.error_message[:20]))
        if heard and (change.version, change.to_stage) == (1, STAGE_LIVE):
            break
    past.cancel()
    expected = f"v{manifest.version}: its files cannot be used"[:20]
    assert heard == [
        (manifest.version, STAGE_CANDIDATE, ""),
        (1, STAGE_RETIRED, ""),
        (manifest.version, STAGE_LIVE, ""),
        (0, 0, expected),
        (manifest.version, STAGE_REJECTED, ""),
        (1, STAGE_LIVE, ""),
    ]


def test_what_is_served_may_be_damaged_when_another_version_is_asked_for(stubs: Stubs, root: Path) -> None:
    """The damage may be why: the other version is whole, and goes live."""
    path, manifest = new_version(stubs, root)
    promote(stubs, manifest.version)
    wait_served(stubs, manifest.version)
    remove_all(path)
    stubs.policies.Rollback(RollbackRequest(version=1, actor="test"), timeout=TIMEOUT_SECONDS)
    wait_served(stubs, 1)
    assert get(stubs, 1).stage == STAGE_LIVE
