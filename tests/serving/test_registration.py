"""What may be registered and promoted, and what is refused; the server still serves version 1 whatever it is given."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from alignd.v1.policy_manifest_pb2 import PolicyManifest
from alignd.v1.policy_service_pb2 import (
    STAGE_CANDIDATE,
    GetPolicyRequest,
    ListPoliciesRequest,
    PromoteRequest,
    RollbackRequest,
)
from tests.serving import versions
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, detail, draw, refused
from tests.serving.rollout import (
    add_a_file,
    add_a_pickle,
    flip_a_bit,
    get,
    live_version,
    new_version,
    next_version,
    promote,
    registration,
    remove_a_file,
    remove_all,
    truncate,
)
from tests.serving.versions import Weights, write_version

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("version_1_again")]

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def make_the_manifest_a_pipe(path: Path) -> None:
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


def make_a_file_a_link(path: Path) -> None:
    (path / "config.json").rename(path.parent.parent / f"{path.name}-config.json")
    (path / "config.json").symlink_to(path.parent.parent / f"{path.name}-config.json")


@pytest.mark.parametrize("damage", [remove_a_file, remove_all, truncate], ids=lambda each: each.__name__)
def test_files_that_cannot_be_read_may_come_back_so_the_trainer_is_told_to_wait(
    stubs: Stubs, root: Path, damage: Callable[[Path], None]
) -> None:
    path, manifest = write_version(root, root / "v1", next_version(root))
    damage(path)
    error = refused(stubs.policies.RegisterPolicy, registration(path, manifest), grpc.StatusCode.UNAVAILABLE)
    assert detail(error, error_details_pb2.ErrorInfo).reason == "ARTIFACT_UNREADABLE"
    assert "Traceback" not in error.details()


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, add_a_file, add_a_pickle, make_the_manifest_a_pipe, make_a_file_a_link],
    ids=lambda each: each.__name__,
)
def test_damaged_files_are_not_registered(stubs: Stubs, root: Path, damage: Callable[[Path], None]) -> None:
    path, manifest = write_version(root, root / "v1", next_version(root))
    damage(path)
    error = refused(stubs.policies.RegisterPolicy, registration(path, manifest), PRECONDITION, "artifact_uri")
    assert detail(error, error_details_pb2.ErrorInfo).reason == "BAD_ARTIFACT"
    refused(stubs.policies.Promote, PromoteRequest(version=manifest.version, actor="a"), grpc.StatusCode.NOT_FOUND)
    assert draw(stubs).completions[0].policy.version == 1


@pytest.mark.parametrize(
    "change",
    [
        versions.with_nan,
        versions.of_another_shape,
        versions.of_another_type,
        versions.with_one_more,
        versions.with_one_less,
    ],
    ids=lambda each: each.__name__,
)
def test_unfit_weights_are_not_registered(stubs: Stubs, root: Path, change: Callable[[Weights], Weights]) -> None:
    path, manifest = write_version(root, root / "v1", next_version(root), change=change)
    error = refused(stubs.policies.RegisterPolicy, registration(path, manifest), PRECONDITION, "artifact_uri")
    assert "tensor" in error.details()


def test_a_version_with_another_tokenizer_is_not_registered(stubs: Stubs, root: Path) -> None:
    """Its prompts would be rendered with the old tokenizer until the next start, and with the new one from then on."""
    version = next_version(root)
    path, manifest = write_version(root, root / "v1", version, change_files=versions.with_another_template)
    error = refused(stubs.policies.RegisterPolicy, registration(path, manifest), PRECONDITION, "artifact_uri")
    assert "chat_template.jinja: only weights may differ" in error.details()


@pytest.mark.parametrize(
    "uri",
    [
        "policies/v2",
        "./v2",
        "~/v2",
        "http://host/v2",
        "s3://bucket/v2",
        "http://[v2",
        "file:v2",
        "file://v2",
        "file://evilhost/policies/v2",
        "file:///policies/v2%00",
    ],
)
def test_a_place_that_is_not_absolute_is_refused(stubs: Stubs, root: Path, uri: str) -> None:
    manifest = get(stubs, 1).manifest
    manifest.version = next_version(root)
    request = registration(root / "v1", manifest, artifact_uri=uri)
    refused(stubs.policies.RegisterPolicy, request, grpc.StatusCode.INVALID_ARGUMENT, "artifact_uri")


def test_what_lies_elsewhere_is_refused_in_the_same_words_whatever_lies_there(
    stubs: Stubs, root: Path, tmp_path: Path
) -> None:
    path, manifest = write_version(root, root / "v1", next_version(root))
    shutil.copytree(path, tmp_path / "real")
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "to-root").symlink_to(root)
    elsewhere = [tmp_path / "real", tmp_path / "nothing", Path("/etc/passwd"), root / "link" / "real", root]
    behind = [tmp_path / "to-root" / path.name, root / ".." / root.name / path.name]
    try:
        said = []
        for uri in (*elsewhere, *behind):
            request = registration(path, manifest, artifact_uri=str(uri))
            error = refused(stubs.policies.RegisterPolicy, request, grpc.StatusCode.INVALID_ARGUMENT, "artifact_uri")
            said.append(error.details())
        assert len(set(said[: len(elsewhere)])) == 1
        assert not any(str(tmp_path) in each or "passwd" in each for each in said)
        path.rename(root.parent / "moved")
        path.symlink_to(root.parent / "moved")
        refused(stubs.policies.RegisterPolicy, registration(path, manifest), PRECONDITION, "artifact_uri")
    finally:
        (root / "link").unlink()


def lose_a_logprob(manifest: PolicyManifest) -> None:
    del manifest.probes[0].logprobs[-1]


def make_nan(manifest: PolicyManifest) -> None:
    manifest.probes[0].logprobs[0] = float("nan")


@pytest.mark.parametrize(
    ("change_manifest", "field"),
    [
        (lambda manifest: manifest.ClearField("probes"), "manifest.probes"),
        (lose_a_logprob, "manifest.probes[0].logprobs"),
        (make_nan, "manifest.probes[0].logprobs"),
    ],
)
def test_a_version_that_could_not_be_proved_is_not_registered(
    stubs: Stubs, root: Path, change_manifest: Callable[[PolicyManifest], None], field: str
) -> None:
    """Weights that are finite and no model's, such as a model's times 1e30, would go live without a proof."""
    path, manifest = write_version(root, root / "v1", next_version(root), change_manifest=change_manifest)
    refused(stubs.policies.RegisterPolicy, registration(path, manifest), grpc.StatusCode.INVALID_ARGUMENT, field)


def test_who_and_why_have_no_control_characters(stubs: Stubs, root: Path) -> None:
    """They are printed on terminals, where an escape code or a new line would forge history."""
    for field in ("actor", "reason"):
        for text in ("\x1b[2J", "one\nOPERATOR: two", "\x9b1m"):
            request = PromoteRequest(version=1, **{"actor": "a", "reason": "b", field: text})
            refused(stubs.policies.Promote, request, grpc.StatusCode.INVALID_ARGUMENT, field)


def test_a_manifest_of_other_files_is_refused(stubs: Stubs, root: Path) -> None:
    path, manifest = write_version(root, root / "v1", next_version(root))
    other = PolicyManifest()
    other.CopyFrom(manifest)
    other.version += 1
    for request in (registration(path, other), registration(root / "v1", manifest)):
        refused(stubs.policies.RegisterPolicy, request, grpc.StatusCode.INVALID_ARGUMENT, "manifest")


def test_a_version_is_registered_once(stubs: Stubs, root: Path, tmp_path: Path) -> None:
    path, manifest = new_version(stubs, root)
    again = registration(path, manifest, artifact_uri=path.as_uri())
    assert stubs.policies.RegisterPolicy(again, timeout=TIMEOUT_SECONDS).policy == get(stubs, manifest.version)
    other_path, other = write_version(
        tmp_path / "policies", root / "v1", manifest.version, change=lambda weights: versions.perturbed(weights, 99)
    )
    taken = registration(other_path, other)
    refused(stubs.policies.RegisterPolicy, taken, grpc.StatusCode.ALREADY_EXISTS)


def test_a_version_of_unknown_origin_is_refused(stubs: Stubs, root: Path) -> None:
    for parent, reference in ((999, 1), (1, 999)):
        path, manifest = write_version(root, root / "v1", next_version(root), parent=parent, reference=reference)
        error = refused(stubs.policies.RegisterPolicy, registration(path, manifest), PRECONDITION)
        assert "999 is not registered" in error.details()


def test_what_cannot_go_live_does_not(stubs: Stubs, root: Path) -> None:
    refused(stubs.policies.Promote, PromoteRequest(version=999, actor="a"), grpc.StatusCode.NOT_FOUND)
    refused(stubs.policies.Rollback, RollbackRequest(version=999, actor="a"), grpc.StatusCode.NOT_FOUND)
    candidate = new_version(stubs, root)[1].version
    stale = PromoteRequest(version=candidate, actor="a", expected_live_version=candidate)
    refused(stubs.policies.Promote, stale, grpc.StatusCode.ABORTED)
    refused(stubs.policies.Rollback, RollbackRequest(version=candidate, actor="a"), PRECONDITION)
    assert get(stubs, candidate).stage == STAGE_CANDIDATE
    assert promote(stubs, candidate) == promote(stubs, candidate)
    late = RollbackRequest(actor="a", expected_live_version=1)
    refused(stubs.policies.Rollback, late, grpc.StatusCode.ABORTED)
    refused(stubs.policies.Promote, PromoteRequest(version=1, actor="a"), PRECONDITION)
    assert live_version(stubs) == candidate


def test_of_many_who_promote_at_once_one_wins(stubs: Stubs, root: Path) -> None:
    made = [new_version(stubs, root)[1].version for _ in range(3)]
    calls = [
        stubs.policies.Promote.future(
            PromoteRequest(version=each, actor="a", expected_live_version=1), timeout=TIMEOUT_SECONDS
        )
        for each in made
    ]
    codes = [call.code() for call in calls]
    assert sorted(code.name for code in codes) == ["ABORTED", "ABORTED", "OK"]
    assert live_version(stubs) == made[codes.index(grpc.StatusCode.OK)]


def test_pages_of_versions(stubs: Stubs) -> None:
    everything = stubs.policies.ListPolicies(ListPoliciesRequest(), timeout=TIMEOUT_SECONDS).policies
    numbers = [policy.version for policy in everything]
    assert numbers == sorted(numbers, reverse=True)
    paged: list[int] = []
    token = ""
    while token or not paged:
        page = stubs.policies.ListPolicies(ListPoliciesRequest(page_size=3, page_token=token), timeout=TIMEOUT_SECONDS)
        assert len(page.policies) <= 3
        paged += [policy.version for policy in page.policies]
        token = page.next_page_token
    assert paged == numbers
    live = stubs.policies.GetPolicy(GetPolicyRequest(policy="live"), timeout=TIMEOUT_SECONDS).policy
    assert live == everything[-1]
