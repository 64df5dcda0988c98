"""Feedback over the public API of a real server: what is acknowledged arrives once, what is invalid is refused."""

import threading
import uuid
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from alignd.v1 import events_pb2, feedback_token_pb2
from alignd.v1.feedback_service_pb2 import SubmitDemonstrationRequest
from feedback.bus.contract import Record
from feedback.bus.topics import RANKINGS
from feedback.bus.url import open_bus
from feedback.store.reader import Store
from feedback.store.stored import RankedGroup
from feedback.token import load_keyring, sign, verify
from tests.serving.calls import (
    TIMEOUT_SECONDS,
    Stubs,
    detail,
    draw,
    fields_of,
    groups,
    long_request,
    ranking_request,
    refused,
    sample_request,
)
from tests.serving.processes import Server, wait_until

pytestmark = pytest.mark.timeout(300)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DENIED = grpc.StatusCode.PERMISSION_DENIED


def stored(server: Server, ranking_id: str) -> RankedGroup:
    """Returns the ranking as training reads it, once it has arrived."""
    with closing(Store(server.store_url)) as store:
        found: list[RankedGroup] = []

        def arrived() -> bool:
            found[:] = [group for group in store.ranked_groups() if group.ranking_id == ranking_id]
            return bool(found)

        wait_until(arrived, 30, "the ranking in the store")
    (group,) = found
    return group


def test_a_ranking_arrives_as_it_was_given(stubs: Stubs, server: Server) -> None:
    sample = draw(stubs)
    best, second, third, worst = (each.completion_id for each in sample.completions)
    request = ranking_request(
        sample,
        groups=groups([third], [best, worst], [second]),
        shown_completion_ids=[worst, third, second, best],
        comment="third says it",
    )
    response = stubs.feedback.SubmitRanking(request, timeout=TIMEOUT_SECONDS)
    group = stored(server, response.ranking_id)
    assert (group.sample_id, group.user_id, group.prompt) == (sample.sample_id, "ada", sample_request().prompt)
    assert [(each.completion_id, each.rank) for each in group.completions] == [
        (third, 0),
        (best, 1),
        (worst, 1),
        (second, 2),
    ]
    assert {each.completion_id: each.text for each in group.completions} == {
        each.completion_id: each.text for each in sample.completions
    }
    assert {each.policy_version for each in group.completions} == {1}


def test_what_is_written_to_the_bus_by_others_is_not_learned_from(stubs: Stubs, server: Server) -> None:
    sample = draw(stubs)
    mine = [each.completion_id for each in sample.completions]
    forged = events_pb2.RankingEvent(event_id="forged", user_id="never seen", sample_id=sample.sample_id)
    forged.groups.extend(groups(mine[:1], mine[1:]))
    forged.event_time.GetCurrentTime()
    with closing(Store(server.store_url)) as store, closing(open_bus(f"sqlite:///{server.data_dir}/bus.db")) as bus:
        before = store.num_dead_letters()
        bus.publish([Record(RANKINGS, b"k", forged.SerializeToString(), "forged")])
        wait_until(lambda: store.num_dead_letters() > before, 30, "the dead letter")
        response = stubs.feedback.SubmitRanking(ranking_request(sample), timeout=TIMEOUT_SECONDS)
        stored(server, response.ranking_id)
        assert "forged" not in {group.ranking_id for group in store.ranked_groups()}


def test_a_retry_is_the_same_ranking_and_is_stored_once(stubs: Stubs, server: Server) -> None:
    with closing(Store(server.store_url)) as store:
        request = ranking_request(draw(stubs))
        responses = [stubs.feedback.SubmitRanking(request, timeout=TIMEOUT_SECONDS)]
        stored(server, responses[0].ranking_id)
        before = store.num_rankings()
        responses += [stubs.feedback.SubmitRanking(request, timeout=TIMEOUT_SECONDS) for _ in range(5)]
        assert all(response == responses[0] for response in responses)
        later = stubs.feedback.SubmitRanking(ranking_request(draw(stubs)), timeout=TIMEOUT_SECONDS)
        stored(server, later.ranking_id)
        assert store.num_rankings() == before + 1


def test_a_request_id_is_for_one_content(stubs: Stubs) -> None:
    sample = draw(stubs)
    request = ranking_request(sample)
    stubs.feedback.SubmitRanking(request, timeout=TIMEOUT_SECONDS)
    for changed in ({"comment": "or not"}, {"groups": groups([each.completion_id for each in sample.completions])}):
        other = ranking_request(sample, request_id=request.request_id, **changed)
        refused(stubs.feedback.SubmitRanking, other, grpc.StatusCode.ALREADY_EXISTS, "request_id")


def test_a_later_ranking_replaces_the_earlier(stubs: Stubs, server: Server) -> None:
    sample = draw(stubs)
    ids = [each.completion_id for each in sample.completions]
    first = stubs.feedback.SubmitRanking(ranking_request(sample), timeout=TIMEOUT_SECONDS)
    again = ranking_request(sample, groups=groups(*([each] for each in reversed(ids))))
    second = stubs.feedback.SubmitRanking(again, timeout=TIMEOUT_SECONDS)
    assert first.ranking_id != second.ranking_id
    assert [each.completion_id for each in stored(server, second.ranking_id).completions] == ids[::-1]
    with closing(Store(server.store_url)) as store:
        rankings = [group.ranking_id for group in store.ranked_groups() if group.sample_id == sample.sample_id]
    assert rankings == [second.ranking_id]


IDS_AT_FAULT: list[tuple[str, Callable[[list[str]], dict[str, Any]], list[str]]] = [
    ("unknown", lambda ids: {"groups": groups(ids, ["nobody's"])}, ["groups"]),
    ("missing", lambda ids: {"groups": groups(ids[1:])}, ["groups"]),
    ("repeated", lambda ids: {"groups": groups(ids, ids[:1])}, ["groups"]),
    ("repeated", lambda ids: {"groups": groups([*ids, ids[0]])}, ["groups"]),
    ("missing", lambda ids: {"shown_completion_ids": ids[1:]}, ["shown_completion_ids"]),
    ("repeated", lambda ids: {"shown_completion_ids": [*ids, ids[0]]}, ["shown_completion_ids"]),
    ("unknown", lambda ids: {"groups": groups(["x"]), "shown_completion_ids": ids}, ["groups", "groups"]),
]


@pytest.mark.parametrize(("fault", "changed", "fields"), IDS_AT_FAULT)
def test_each_completion_stands_in_a_ranking_once(
    stubs: Stubs, fault: str, changed: Callable[[list[str]], dict[str, Any]], fields: list[str]
) -> None:
    sample = draw(stubs)
    request = ranking_request(sample, **changed([each.completion_id for each in sample.completions]))
    error = refused(stubs.feedback.SubmitRanking, request, INVALID)
    assert fields_of(error) == fields
    assert fault in error.details()


def test_one_completion_cannot_be_ranked(stubs: Stubs) -> None:
    request = ranking_request(draw(stubs, num_completions=1))
    refused(stubs.feedback.SubmitRanking, request, INVALID, "feedback_token")


def with_flipped_bit(token: str, position: int) -> str:
    flipped = chr(ord(token[position]) ^ 1)
    return token[:position] + flipped + token[position + 1 :]


def test_a_forged_token_is_refused(stubs: Stubs) -> None:
    sample = draw(stubs)
    token = sample.feedback_token
    forged = [with_flipped_bit(token, position) for position in range(0, len(token), 7)]
    forged += [token[:-1], token + "A", token.split(".")[0], f"{token}.{token}", "x", ".", "ü"]
    for each in forged:
        request = ranking_request(sample, feedback_token=each)
        refused(stubs.feedback.SubmitRanking, request, DENIED, "feedback_token")


def test_an_expired_token_is_refused(stubs: Stubs, server: Server) -> None:
    sample = draw(stubs)
    keyring = load_keyring(server.data_dir / "feedback_keys")
    claims = verify(sample.feedback_token, keyring, datetime.now(UTC))
    expired = feedback_token_pb2.FeedbackClaims()
    expired.CopyFrom(claims)
    expired.expire_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))
    request = ranking_request(sample, feedback_token=sign(expired, keyring))
    error = refused(stubs.feedback.SubmitRanking, request, DENIED, "feedback_token")
    assert detail(error, error_details_pb2.ErrorInfo).reason == "TOKEN_EXPIRED"
    stubs.feedback.SubmitRanking(ranking_request(sample, feedback_token=sign(claims, keyring)), timeout=TIMEOUT_SECONDS)


def test_nobody_ranks_what_was_shown_to_somebody_else(stubs: Stubs) -> None:
    sample = draw(stubs, user_id="bob")
    refused(stubs.feedback.SubmitRanking, ranking_request(sample), DENIED, "user_id")
    other = draw(stubs)
    mixed = ranking_request(other, groups=groups([each.completion_id for each in sample.completions]))
    assert fields_of(refused(stubs.feedback.SubmitRanking, mixed, INVALID)) == ["groups", "groups"]


def test_a_demonstration_is_durable_once(stubs: Stubs) -> None:
    sample = draw(stubs, num_completions=1)
    fields = {"request_id": str(uuid.uuid4()), "feedback_token": sample.feedback_token, "user_id": "ada"}
    submit = stubs.feedback.SubmitDemonstration
    first, again = (
        submit(SubmitDemonstrationRequest(**fields, text="Thus."), timeout=TIMEOUT_SECONDS) for _ in range(2)
    )
    assert first == again
    assert first.demonstration_id
    other = SubmitDemonstrationRequest(**fields, text="Otherwise.")
    refused(submit, other, grpc.StatusCode.ALREADY_EXISTS, "request_id")
    forged = SubmitDemonstrationRequest(**{**fields, "feedback_token": "x"}, text="Thus.")
    refused(submit, forged, DENIED, "feedback_token")


def test_rankings_are_taken_while_the_engine_is_busy(stubs: Stubs) -> None:
    sample = draw(stubs)
    busy = stubs.inference.StreamSample(long_request(num_completions=16), timeout=TIMEOUT_SECONDS)
    next(busy)
    done = threading.Event()
    future = stubs.feedback.SubmitRanking.future(ranking_request(sample), timeout=TIMEOUT_SECONDS)
    future.add_done_callback(lambda _: done.set())
    assert done.wait(30)
    assert future.code() is grpc.StatusCode.OK
    busy.cancel()
