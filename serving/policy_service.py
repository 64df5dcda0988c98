"""PolicyService: what the trainer and operators ask of policy versions, as events on the policy log."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
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
from policies.artifact import ArtifactError, ComparisonError, UnreadableError, changed_settings, verify_artifact
from policies.location import artifact_folder, folder_below
from policies.state import PolicyRecord, PolicyState, as_policy, new_change, previous_live, reinstated_stage
from serving.access.callers import caller
from serving.errors import Refusal, Violation, bad_field, shortened, unavailable
from serving.policy_log import PolicyLog

_DEFAULT_PAGE_SIZE = 100
_REJECTED = "it is REJECTED: `alignd policies show` says why; Reinstate takes that back, if it was a mistake"


class PolicyService(policy_service_pb2_grpc.PolicyServiceServicer):
    """The handlers; all state is the policy log's."""

    def __init__(self, policies: PolicyLog, root: Path) -> None:
        self.policies = policies
        self.root = root
        """The folder below which the files of all versions must lie."""

    async def RegisterPolicy(
        self, request: policy_service_pb2.RegisterPolicyRequest, context: Any
    ) -> policy_service_pb2.RegisterPolicyResponse:
        """Verifies the files against the manifest, and registers the version."""
        version = request.manifest.version
        present = self._state().policies.get(version)
        if present and present.manifest.weight_digest != request.manifest.weight_digest:
            raise _taken(version)
        _check_probes(request.manifest)
        await asyncio.to_thread(self._verify, request)
        change = new_change(version, STAGE_UNSPECIFIED, STAGE_CANDIDATE, caller().name, request.reason, request.actor)
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
        version = request.manifest.version
        try:
            named, folder = artifact_folder(request.artifact_uri), folder_below(self.root, request.artifact_uri)
        except ArtifactError as error:
            raise bad_field("artifact_uri", shortened(str(error))) from error
        if named != folder:
            raise bad_field("artifact_uri", "must name the folder itself, without links and `..`")
        try:
            shapes_like = artifact_folder(reference.artifact_uri) if reference else None
            found = verify_artifact(folder, shapes_like)
        except ComparisonError as error:
            raise unavailable("ARTIFACT_UNREADABLE", f"policy v{version}: {shortened(str(error))}") from error
        except UnreadableError as error:
            why = shortened(f"its files cannot be read now: {error}")
            raise unavailable("ARTIFACT_UNREADABLE", f"policy v{version}: {why}") from error
        except ArtifactError as error:
            raise _precondition("BAD_ARTIFACT", str(error), version, field="artifact_uri") from error
        if found != request.manifest:
            raise bad_field("manifest", f"is not the one that lies in {request.artifact_uri}")
        changed = changed_settings(found, reference.manifest) if reference else []
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
            raise _precondition("WRONG_STAGE", _REJECTED, request.version)
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
            raise _precondition("NOTHING_TO_ROLL_BACK_TO", "no version is left that was live before the present one", 0)
        record = self._find(version, f"v{version}")
        if record.stage == STAGE_REJECTED:
            raise _precondition("WRONG_STAGE", _REJECTED, version)
        if record.stage not in (STAGE_RETIRED, STAGE_LIVE):
            name = Stage.Name(record.stage).removeprefix("STAGE_")
            raise _precondition("WRONG_STAGE", f"it is {name}: promote it instead", version)
        if record.stage != STAGE_LIVE:
            expected = request.expected_live_version or state.live_version
            record = await self._make_live(record, request.actor, request.reason, expected)
        return policy_service_pb2.RollbackResponse(policy=as_policy(record))

    async def Reject(
        self, request: policy_service_pb2.RejectRequest, context: Any
    ) -> policy_service_pb2.RejectResponse:
        """Rejects a version; if it was live, the one before it is live again."""
        record = self._find(request.version, f"v{request.version}")
        if record.stage == STAGE_LIVE and not previous_live(self.policies.state):
            why = "it is LIVE, and no other version was live before it: promote another one first"
            raise _precondition("NOTHING_TO_ROLL_BACK_TO", why, request.version)
        if record.stage != STAGE_REJECTED:
            record = await self._change_stage(record, STAGE_REJECTED, request.actor, request.reason)
        return policy_service_pb2.RejectResponse(policy=as_policy(record))

    async def Reinstate(
        self, request: policy_service_pb2.ReinstateRequest, context: Any
    ) -> policy_service_pb2.ReinstateResponse:
        """Takes back a rejection."""
        record = self._find(request.version, f"v{request.version}")
        if record.stage == STAGE_REJECTED:
            record = await self._change_stage(record, reinstated_stage(record), request.actor, request.reason)
        elif record.history[-1].from_stage != STAGE_REJECTED:
            name = Stage.Name(record.stage).removeprefix("STAGE_")
            raise _precondition("WRONG_STAGE", f"it is {name}: only a REJECTED version is reinstated", request.version)
        return policy_service_pb2.ReinstateResponse(policy=as_policy(record))

    async def Watch(
        self, request: policy_service_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[policy_service_pb2.WatchResponse]:
        """Streams every change."""
        async for change in self.policies.watch(request.after_revision):
            yield change

    async def _make_live(self, record: PolicyRecord, actor: str, reason: str, expected_live: int) -> PolicyRecord:
        return await self._change_stage(record, STAGE_LIVE, actor, reason, expected_live)

    async def _change_stage(
        self, record: PolicyRecord, to_stage: Stage, actor: str, reason: str, expected_live: int = 0
    ) -> PolicyRecord:
        version = record.manifest.version
        outcome = await self.policies.propose(
            events_pb2.PolicyEvent(
                stage_changed=events_pb2.PolicyStageChanged(
                    change=new_change(version, record.stage, to_stage, caller().name, reason, actor),
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


def _check_probes(manifest: PolicyManifest) -> None:
    """Checks that a server can prove that it serves this version.

    Raises:
        Refusal: INVALID_ARGUMENT, naming the field.
    """
    if manifest.parent_version and not manifest.probes:
        raise bad_field("manifest.probes", "must have at least one, since the version was made from another")
    for index, probe in enumerate(manifest.probes):
        if len(probe.logprobs) != len(probe.token_ids) - 1 or not all(map(math.isfinite, probe.logprobs)):
            rule = "must have one finite log-probability for each token but the first"
            raise bad_field(f"manifest.probes[{index}].logprobs", rule)


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
        f"policy v{version}: {message}" if version else message,
        violations=[Violation(field, message)],
        metadata={"version": str(version)},
    )
