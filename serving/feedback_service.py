"""FeedbackService: checks that feedback is about what this user was shown, and answers when it is durable."""

import uuid
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from alignd.v1 import events_pb2, feedback_service_pb2, feedback_service_pb2_grpc, feedback_token_pb2
from buf.validate import validate_pb2
from feedback.bus.topics import DEMONSTRATIONS, RANKINGS
from feedback.identity import qualified
from feedback.outbox.door import Outbox
from feedback.token import Keyring, TokenError, verify
from serving.access.callers import caller
from serving.access.limits import Limits
from serving.calls import note, note_content
from serving.errors import Violation, bad_field, bad_fields, not_permitted
from serving.recording import record

# Ids are computed from the user and the request, so that a retry at any replica gets the same one.
_RANKING_NAMESPACE = uuid.UUID("7a0a1f0e-5c1f-4a9b-9d56-6a0f9a1a4c01")
_DEMONSTRATION_NAMESPACE = uuid.UUID("7a0a1f0e-5c1f-4a9b-9d56-6a0f9a1a4c02")
_MOST_NAMED = 3
_TOKEN_FIELD: Any = feedback_service_pb2.SubmitRankingRequest.DESCRIPTOR.fields_by_name["feedback_token"]
_LONGEST_TOKEN_BYTES: int = _TOKEN_FIELD.GetOptions().Extensions[validate_pb2.field].string.max_bytes

Request = feedback_service_pb2.SubmitRankingRequest | feedback_service_pb2.SubmitDemonstrationRequest


class FeedbackService(feedback_service_pb2_grpc.FeedbackServiceServicer):
    """The handlers; all they need is the keyring, the outbox, and who may send how much."""

    def __init__(self, outbox: Outbox, keyring: Keyring, limits: Limits) -> None:
        self.outbox = outbox
        self.keyring = keyring
        self.limits = limits

    def check_token(self, request: Request) -> None:
        """Checks the token, before the rest of a request is looked at: it costs little, and strangers have none.

        Raises:
            Refusal: INVALID_ARGUMENT if there is no token or it is too long, else as for `_claims`.
        """
        if not 0 < len(request.feedback_token.encode()) <= _LONGEST_TOKEN_BYTES:
            raise bad_field("feedback_token", f"must have 1 to {_LONGEST_TOKEN_BYTES} bytes")
        self._claims(request.feedback_token, request.user_id)

    async def SubmitRanking(
        self, request: feedback_service_pb2.SubmitRankingRequest, context: Any
    ) -> feedback_service_pb2.SubmitRankingResponse:
        """Records a ranking."""
        claims = self._claims(request.feedback_token, request.user_id)
        await self.limits.request(caller(), request.user_id, "feedback")
        note(sample_id=claims.sample_id)
        note_content(comment=request.comment)
        _check_ranking(request, claims)
        event = events_pb2.RankingEvent(
            event_id=_feedback_id(_RANKING_NAMESPACE, claims, request.request_id),
            user_id=request.user_id,
            application=claims.application,
            sample_id=claims.sample_id,
            groups=request.groups,
            shown_completion_ids=request.shown_completion_ids,
            comment=request.comment,
            policy_versions={each.completion_id: each.policy_version for each in claims.completions},
        )
        acknowledged = await record(self.outbox, self.keyring, RANKINGS, event.sample_id, event)
        return feedback_service_pb2.SubmitRankingResponse(ranking_id=event.event_id, acknowledge_time=acknowledged)

    async def SubmitDemonstration(
        self, request: feedback_service_pb2.SubmitDemonstrationRequest, context: Any
    ) -> feedback_service_pb2.SubmitDemonstrationResponse:
        """Records a demonstration."""
        claims = self._claims(request.feedback_token, request.user_id)
        note(sample_id=claims.sample_id)
        note_content(text=request.text)
        await self.limits.request(caller(), request.user_id, "feedback")
        event = events_pb2.DemonstrationEvent(
            event_id=_feedback_id(_DEMONSTRATION_NAMESPACE, claims, request.request_id),
            user_id=request.user_id,
            application=claims.application,
            sample_id=claims.sample_id,
            text=request.text,
        )
        acknowledged = await record(self.outbox, self.keyring, DEMONSTRATIONS, event.sample_id, event)
        return feedback_service_pb2.SubmitDemonstrationResponse(
            demonstration_id=event.event_id, acknowledge_time=acknowledged
        )

    def _claims(self, feedback_token: str, user_id: str) -> feedback_token_pb2.FeedbackClaims:
        """Returns what the token says.

        Raises:
            Refusal: PERMISSION_DENIED if the token is not ours, has expired, or is another application's or user's.
        """
        try:
            claims = verify(feedback_token, self.keyring, datetime.now(UTC))
        except TokenError as error:
            raise not_permitted(f"TOKEN_{error.reason.name}", "feedback_token", error.reason.value) from error
        if claims.application != caller().application:
            why = "is of a sample that another application drew"
            raise not_permitted("TOKEN_OF_ANOTHER_APPLICATION", "feedback_token", why)
        if claims.user_id != user_id:
            raise not_permitted("TOKEN_OF_ANOTHER_USER", "user_id", "is not the user that the sample was drawn for")
        return claims


def _feedback_id(namespace: uuid.UUID, claims: feedback_token_pb2.FeedbackClaims, request_id: str) -> str:
    user = qualified(claims.application, claims.user_id)
    return str(uuid.uuid5(namespace, f"{uuid.UUID(request_id)}/{user}"))


def _check_ranking(
    request: feedback_service_pb2.SubmitRankingRequest, claims: feedback_token_pb2.FeedbackClaims
) -> None:
    """Checks that a ranking has each completion of the sample exactly once.

    Raises:
        Refusal: INVALID_ARGUMENT, naming the ids that are unknown, missing or repeated.
    """
    issued = {each.completion_id for each in claims.completions}
    if len(issued) < 2:
        raise bad_field("feedback_token", "is of a sample with one completion; a ranking needs at least 2")
    ranked = (completion_id for group in request.groups for completion_id in group.completion_ids)
    violations = _differences("groups", ranked, issued)
    if request.shown_completion_ids:
        violations += _differences("shown_completion_ids", request.shown_completion_ids, issued)
    if violations:
        raise bad_fields(violations)


def _differences(field: str, completion_ids: Iterable[str], issued: set[str]) -> list[Violation]:
    """Returns in which ways `completion_ids` differs from each issued id once."""
    counts = Counter(completion_ids)
    found = {
        "unknown": sorted(counts.keys() - issued),
        "missing": sorted(issued - counts.keys()),
        "repeated": sorted(each for each, count in counts.items() if count > 1),
    }
    allowed = "each completion of the sample must stand in it exactly once"
    return [Violation(field, f"{kind}: {_named(ids)}; {allowed}") for kind, ids in found.items() if ids]


def _named(ids: list[str]) -> str:
    """Returns the first few ids, and how many more there are."""
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    return ", ".join(ids[:_MOST_NAMED]) + more
