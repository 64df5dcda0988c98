"""PolicyService: what the trainer and operators ask of policy versions, as events on the policy log."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from alignd.v1 import events_pb2, policy_service_pb2, policy_service_pb2_grpc
from alignd.v1.policy_manifest_pb2 import PolicyManifest
from alignd.v1.policy_service_pb2 import (
    STAGE_CANDIDATE,
    STAGE_LIVE,
    STAGE_REJECTED,
    STAGE_RETIRED,
    STAGE_UNSPECIFIED,
    Stage,
)
from policies.artifact import ArtifactError, ComparisonError, verify_artifact
from policies.location import artifact_folder
from policies.state import PolicyRecord, PolicyState, as_policy, new_change, previous_live
from serving.errors import Refusal, Violation, bad_field, shortened, unavailable
from serving.policy_log import PolicyLog

_DEFAULT_PAGE_SIZE = 100


class PolicyService(policy_service_pb2_grpc.PolicyServiceServicer):
    """The handlers; all state is the policy log's."""

    def __init__(self, policies: PolicyLog) -> None:
        self.policies = policies

    async def RegisterPolicy(
        self, request: policy_service_pb2.RegisterPolicyRequest, context: Any
    ) -> policy_service_pb2.RegisterPolicyResponse:
        """Verifies the files against the manifest, and registers the version."""
        version = request.manifest.version
        present = self._state().policies.get(version)
        if present and present.manifest.weight_digest != request.manifest.weight_digest:
            raise _taken(version)
        await asyncio.to_thread(self._verify, request)
        change = new_change(version, STAGE_UNSPECIFIED, STAGE_CANDIDATE, request.actor, request.reason)
        outcome = await self.policies.propose(
            events_pb2.PolicyEvent(
                registered=events_pb2.PolicyRegistered(
                    manifest=request.manifest, artifact_uri=request.artifact_uri, change=change
                )
            )
        )
        registered = self.policies.state.policies.get(version)
        if registered and registered.manifest.weight_digest != request.manifest.weight_digest:
            raise _taken(version)
        if outcome.refusal or registered is None:
            raise _precondition("NOT_REGISTRABLE", outcome.refusal, version)
        return policy_service_pb2.RegisterPolicyResponse(policy=as_policy(registered))

    def _verify(self, request: policy_service_pb2.RegisterPolicyRequest) -> None:
        reference = self.policies.state.policies.get(request.manifest.reference_version)
        try:
            folder = artifact_folder(request.artifact_uri)
        except ArtifactError as error:
            raise bad_field("artifact_uri", "must be an absolute path or a file:// URL") from error
        try:
            shapes_like = artifact_folder(reference.artifact_uri) if reference else None
            found = verify_artifact(folder, shapes_like)
        except ComparisonError as error:
            version = request.manifest.version
            raise _precondition("BAD_ARTIFACT", str(error), version, field="manifest.reference_version") from error
        except ArtifactError as error:
            raise _precondition("BAD_ARTIFACT", str(error), request.manifest.version, field="artifact_uri") from error
        if found != request.manifest:
            raise bad_field("manifest", f"is not the one that lies in {request.artifact_uri}")
        changed = _changed_settings(found, reference.manifest) if reference else []
        if changed:
            why = f"{', '.join(changed)}: only weights may differ from the reference version's files"
            raise _precondition("BAD_ARTIFACT", why, found.version, field="artifact_uri")

    async def ListPolicies(
        self, request: policy_service_pb2.ListPoliciesRequest, context: Any
    ) -> policy_service_pb2.ListPoliciesResponse:
        """Lists versions, newest first."""
        state = self._state()
        below = int(request.page_token) if request.page_token else max(state.policies, default=0) + 1
        versions = sorted((version for version in state.policies if version < below), reverse=True)
        page = versions[: request.page_size or _DEFAULT_PAGE_SIZE]
        return policy_service_pb2.ListPoliciesResponse(
            policies=[as_policy(state.policies[version]) for version in page],
            next_page_token=str(page[-1]) if len(page) < len(versions) else "",
            live_version=state.live_version,
            replicas=[state.replicas[name] for name in sorted(state.replicas)],
        )

    async def GetPolicy(
        self, request: policy_service_pb2.GetPolicyRequest, context: Any
    ) -> policy_service_pb2.GetPolicyResponse:
        """Returns one version."""
        live = self._state().live_version
        version = live if request.policy == "live" else int(request.policy[1:])
        return policy_service_pb2.GetPolicyResponse(policy=as_policy(self._find(version, request.policy)))

    async def Promote(
        self, request: policy_service_pb2.PromoteRequest, context: Any
    ) -> policy_service_pb2.PromoteResponse:
        """Makes a version live."""
        record = self._find(request.version, f"v{request.version}")
        if record.stage == STAGE_RETIRED:
            raise _precondition("WRONG_STAGE", "it is RETIRED: roll back to it instead", request.version)
        if record.stage == STAGE_REJECTED:
            raise _precondition("WRONG_STAGE", "it is REJECTED: it never serves again", request.version)
        if record.stage != STAGE_LIVE:
            record = await self._make_live(record, request.actor, request.reason, request.expected_live_version)
        return policy_service_pb2.PromoteResponse(policy=as_policy(record))

    async def Rollback(
        self, request: policy_service_pb2.RollbackRequest, context: Any
    ) -> policy_service_pb2.RollbackResponse:
        """Makes a retired version live again."""
        state = self._state()
        version = request.version or previous_live(state)
        if not version:
            raise _precondition("NOTHING_TO_ROLL_BACK_TO", "no version was live before the present one", 0)
        record = self._find(version, f"v{version}")
        if record.stage not in (STAGE_RETIRED, STAGE_LIVE):
            raise _precondition("WRONG_STAGE", f"it is {Stage.Name(record.stage)}: it was never live", version)
        if record.stage != STAGE_LIVE:
            expected = request.expected_live_version or state.live_version
            record = await self._make_live(record, request.actor, request.reason, expected)
        return policy_service_pb2.RollbackResponse(policy=as_policy(record))

    async def Watch(
        self, request: policy_service_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[policy_service_pb2.WatchResponse]:
        """Streams every change."""
        async for change in self.policies.watch(request.after_revision):
            yield change

    async def _make_live(self, record: PolicyRecord, actor: str, reason: str, expected_live: int) -> PolicyRecord:
        version = record.manifest.version
        outcome = await self.policies.propose(
            events_pb2.PolicyEvent(
                stage_changed=events_pb2.PolicyStageChanged(
                    change=new_change(version, record.stage, STAGE_LIVE, actor, reason),
                    expected_live_version=expected_live,
                )
            )
        )
        if outcome.refusal:
            # The change was allowed when it was asked for, but not at its place in the log: another call came first.
            metadata = {"version": str(version)}
            raise Refusal(grpc.StatusCode.ABORTED, "LOST_RACE", outcome.refusal, metadata=metadata)
        return outcome.state.policies[version]

    def _state(self) -> PolicyState:
        """Returns the state of the policy log.

        Raises:
            Refusal: UNAVAILABLE until the log has been read to its end, since its state would be out of date.
        """
        if not self.policies.started:
            raise unavailable("STARTING", "the server is starting: it is reading the policy log")
        return self.policies.state

    def _find(self, version: int, name: str) -> PolicyRecord:
        record = self._state().policies.get(version)
        if record is None:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "NO_SUCH_POLICY",
                f"there is no policy {name}; ListPolicies lists those there are",
                metadata={"policy": name},
            )
        return record


def _changed_settings(manifest: PolicyManifest, reference: PolicyManifest) -> list[str]:
    """Returns the files besides the weights, such as tokenizer and configuration, that differ from the reference's.

    A swap in place exchanges only weights, so these files would take effect at the next start, unproved.
    """
    ours, theirs = (
        {(file.path, file.sha256) for file in each.files if not file.path.endswith(".safetensors")}
        for each in (manifest, reference)
    )
    return sorted({path for path, _ in ours ^ theirs})


def _taken(version: int) -> Refusal:
    return Refusal(
        grpc.StatusCode.ALREADY_EXISTS,
        "VERSION_TAKEN",
        f"version {version} is taken by other weights",
        metadata={"version": str(version)},
    )


def _precondition(reason: str, message: str, version: int, field: str = "version") -> Refusal:
    message = shortened(message)
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        reason,
        f"policy v{version}: {message}",
        violations=[Violation(field, message)],
        metadata={"version": str(version)},
    )
