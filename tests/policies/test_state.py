"""The rollout state machine keeps its promises whatever events arrive."""

import functools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from alignd.v1 import events_pb2
from alignd.v1.policy_service_pb2 import STAGE_CANARY, STAGE_UNSPECIFIED, Stage
from policies.state import ALLOWED, Outcome, PolicyState, apply, as_policy, previous_live, reinstated_stage
from tests.serving.policy_events import (
    STAGE_CANDIDATE,
    STAGE_LIVE,
    STAGE_REJECTED,
    STAGE_RETIRED,
    moved,
    registered,
    reported,
)

VERSIONS = st.integers(0, 4)
STAGES = st.sampled_from([STAGE_UNSPECIFIED, *ALLOWED, 99])
EVENTS = st.one_of(
    st.builds(registered, VERSIONS, st.sampled_from("ab"), parent=VERSIONS, reference=VERSIONS),
    st.builds(moved, VERSIONS, STAGES, STAGES, expected_live=VERSIONS),
    st.builds(reported, st.sampled_from(["one", "two", ""]), VERSIONS, VERSIONS, st.sampled_from([0.0, 3600.0, 2e4])),
    st.just(events_pb2.PolicyEvent()),
)


def replay(events: Iterable[events_pb2.PolicyEvent]) -> PolicyState:
    return functools.reduce(lambda state, event: apply(state, event).state, events, PolicyState())


def stages(state: PolicyState) -> dict[int, Stage]:
    return {version: record.stage for version, record in state.policies.items()}


class Rollout(RuleBasedStateMachine):
    """Applies any events in any order; those that make sense are more likely."""

    def __init__(self) -> None:
        super().__init__()
        self.state = PolicyState()
        self.events: list[events_pb2.PolicyEvent] = []

    def take(self, event: events_pb2.PolicyEvent) -> Outcome:
        before, self.events = self.state, [*self.events, event]
        outcome = apply(before, event)
        assert not (outcome.refusal and outcome.state != before), "a refused event changed something"
        for version, record in before.policies.items():
            after = outcome.state.policies[version]
            assert after.manifest == record.manifest, "a version is immutable"
            assert after.history[: len(record.history)] == record.history, "history only grows"
            if record.stage == STAGE_REJECTED:
                assert after.stage in (STAGE_REJECTED, reinstated_stage(record)), "only a reinstatement leads back"
        self.state = outcome.state
        return outcome

    @rule(event=EVENTS)
    def anything(self, event: events_pb2.PolicyEvent) -> None:
        self.take(event)

    @rule(version=st.integers(1, 4), weights=st.sampled_from("ab"))
    def register(self, version: int, weights: str) -> None:
        self.take(registered(version, weights))
        assert version in self.state.policies

    @rule(version=st.integers(1, 4), to_stage=st.sampled_from(sorted(ALLOWED)))
    def move(self, version: int, to_stage: Stage) -> None:
        record = self.state.policies.get(version)
        outcome = self.take(moved(version, record.stage if record else STAGE_CANDIDATE, to_stage))
        back = record is not None and record.stage == STAGE_REJECTED
        if record is None or to_stage not in ALLOWED[record.stage] or (back and to_stage != reinstated_stage(record)):
            assert outcome.refusal
        else:
            assert self.state.policies[version].stage == to_stage

    @rule()
    def roll_back(self) -> None:
        previous, live = previous_live(self.state), self.state.live_version
        if previous:
            assert not self.take(moved(previous, STAGE_RETIRED, STAGE_LIVE, expected_live=live)).refusal
            assert (self.state.live_version, previous_live(self.state)) == (previous, live)
            assert self.state.policies[live].stage == STAGE_RETIRED

    @rule()
    def reject_live(self) -> None:
        live, before = self.state.live_version, previous_live(self.state)
        if live:
            assert not self.take(moved(live, STAGE_LIVE, STAGE_REJECTED)).refusal
            assert self.state.live_version == before

    @invariant()
    def at_most_one_is_live(self) -> None:
        live = [version for version, stage in stages(self.state).items() if stage == STAGE_LIVE]
        assert live == ([self.state.live_version] if self.state.live_version else [])

    @invariant()
    def all_that_were_live_can_be_rolled_back_to(self) -> None:
        order = self.state.live_order
        assert len(set(order)) == len(order)
        assert all(self.state.policies[version].stage == STAGE_RETIRED for version in order[:-1])

    @invariant()
    def only_replicas_that_report_have_a_say(self) -> None:
        here = self.state.replicas.keys()
        assert self.state.heard_since.keys() == here
        assert all(since.keys() <= here - {name} for name, since in self.state.heard_since.items())
        assert self.state.found_wrong_by <= here

    @invariant()
    def histories_lead_to_the_stages(self) -> None:
        for version, record in self.state.policies.items():
            steps = [(change.from_stage, change.to_stage) for change in record.history]
            assert steps[0] == (STAGE_UNSPECIFIED, STAGE_CANDIDATE)
            assert [step[1] for step in steps[:-1]] == [step[0] for step in steps[1:]]
            assert steps[-1][1] == record.stage
            assert {change.version for change in record.history} == {version}

    def teardown(self) -> None:
        assert replay(self.events) == self.state, "another replica comes to another state"


TestRollout = Rollout.TestCase


@given(events=st.lists(EVENTS, max_size=20), at=st.integers(0, 20))
def test_a_replica_that_stops_and_goes_on_comes_to_the_same(events: list[events_pb2.PolicyEvent], at: int) -> None:
    wire = [event.SerializeToString() for event in events]
    again = [events_pb2.PolicyEvent.FromString(raw) for raw in wire]
    half = replay(again[:at])
    assert functools.reduce(lambda state, event: apply(state, event).state, again[at:], half) == replay(events)


HOUR = 3600.0


def both(two: PolicyState, *reports: events_pb2.PolicyEvent) -> PolicyState:
    """Returns the state after two replicas have said that they serve v2, and then these reports."""
    events = [reported("one", 2, at_seconds=0), reported("two", 2, at_seconds=1), *reports]
    return functools.reduce(lambda state, event: apply(state, event).state, events, two)


def rejected_by_replicas(version: int) -> events_pb2.PolicyEvent:
    event = moved(version, STAGE_LIVE, STAGE_REJECTED)
    event.stage_changed.needs_quorum = True
    return event


def test_one_replica_of_two_does_not_decide_for_both(two: PolicyState) -> None:
    one = both(two, reported("one", 1, failed=2, at_seconds=5))
    assert apply(one, rejected_by_replicas(2)) == Outcome(one, refusal="not every replica has found version 2 wrong")
    both_ = both(two, reported("one", 1, failed=2), reported("two", 1, failed=2))
    assert stages(apply(both_, rejected_by_replicas(2)).state) == {1: STAGE_LIVE, 2: STAGE_REJECTED}
    healed = apply(both_, reported("two", 2)).state
    assert apply(healed, rejected_by_replicas(2)).refusal
    assert not apply(one, moved(2, STAGE_LIVE, STAGE_REJECTED)).refusal, "an operator may"


def test_a_single_replica_is_every_replica(two: PolicyState) -> None:
    assert apply(two, rejected_by_replicas(2)).refusal, "nobody has found anything"
    alone = apply(two, reported("one", 1, failed=2)).state
    assert apply(alone, rejected_by_replicas(2)).state.live_version == 1


def test_what_was_found_wrong_of_an_earlier_time_as_live_does_not_count(two: PolicyState) -> None:
    found = apply(two, reported("one", 1, failed=2)).state
    again = functools.reduce(
        lambda state, event: apply(state, event).state,
        [moved(1, STAGE_RETIRED, STAGE_LIVE), moved(2, STAGE_RETIRED, STAGE_LIVE)],
        found,
    )
    assert again.live_version == 2
    assert apply(again, rejected_by_replicas(2)).refusal


def test_a_replica_that_is_silent_while_another_reports_is_gone_whatever_their_clocks_say(two: PolicyState) -> None:
    """The clock of one is a day ahead. Only times of one and the same clock are compared."""
    day = 24 * HOUR
    hourly = [reported("one", 1, failed=2, at_seconds=day + hour * HOUR) for hour in range(4)]
    waiting = both(two, *hourly[:3])
    assert waiting.replicas.keys() == {"one", "two"}
    assert apply(waiting, rejected_by_replicas(2)).refusal
    assert both(two, hourly[0], reported("two", 2, at_seconds=HOUR), *hourly[1:]).replicas.keys() == {"one", "two"}
    alone = apply(waiting, hourly[3]).state
    assert alone.replicas.keys() == {"one"}
    assert apply(alone, rejected_by_replicas(2)).state.live_version == 1
    assert apply(alone, reported("two", 2)).state.replicas.keys() == {"one", "two"}


def test_a_rejection_is_taken_back_to_the_stage_that_the_version_can_have(two: PolicyState) -> None:
    events = [moved(2, STAGE_LIVE, STAGE_REJECTED), registered(3, "c"), moved(3, STAGE_CANDIDATE, STAGE_REJECTED)]
    state = functools.reduce(lambda state, event: apply(state, event).state, events, two)
    assert apply(state, moved(2, STAGE_REJECTED, STAGE_CANDIDATE)).refusal == "version 2 would be STAGE_RETIRED"
    assert apply(state, moved(3, STAGE_REJECTED, STAGE_RETIRED)).refusal == "version 3 would be STAGE_CANDIDATE"
    for version, stage in ((2, STAGE_RETIRED), (3, STAGE_CANDIDATE)):
        state = apply(state, moved(version, STAGE_REJECTED, stage)).state
    assert stages(state) == {1: STAGE_LIVE, 2: STAGE_RETIRED, 3: STAGE_CANDIDATE}
    assert apply(state, moved(2, STAGE_RETIRED, STAGE_LIVE)).state.live_version == 2


def test_a_retired_version_that_is_rejected_is_not_rolled_back_to(two: PolicyState) -> None:
    state = apply(two, moved(1, STAGE_RETIRED, STAGE_REJECTED)).state
    assert (state.live_version, previous_live(state)) == (2, 0)


def unusable(version: int, **changes: object) -> events_pb2.PolicyEvent:
    event = registered(version)
    for name, value in changes.items():
        setattr(event.registered, name, value)
    return event


@pytest.mark.parametrize("uri", ["relative/path", "", "s3://bucket/v3", "file://elsewhere/v3", "/policies/\0"])
def test_a_version_at_no_place_of_a_machine_is_passed_over_and_so_is_its_promotion(two: PolicyState, uri: str) -> None:
    outcome = apply(two, unusable(3, artifact_uri=uri))
    assert "version 3 cannot be used: artifact URI" in outcome.refusal
    assert apply(outcome.state, moved(3, STAGE_CANDIDATE, STAGE_LIVE)) == Outcome(
        two, refusal="version 3 is not registered"
    )


def test_a_version_whose_manifest_breaks_the_contract_is_passed_over(two: PolicyState) -> None:
    event = registered(3)
    event.registered.manifest.files[0].path = "../../etc/passwd"
    assert "the manifest is not valid" in apply(two, event).refusal


@pytest.fixture
def two() -> PolicyState:
    """A state in which v1 was live and v2 is."""
    return replay([
        registered(1),
        moved(1, STAGE_CANDIDATE, STAGE_LIVE),
        registered(2, "b", parent=1, reference=1),
        moved(2, STAGE_CANDIDATE, STAGE_LIVE),
    ])  # fmt: skip


def test_promotion_retires_the_one_before(two: PolicyState) -> None:
    assert stages(two) == {1: STAGE_RETIRED, 2: STAGE_LIVE}
    retired = two.policies[1].history[-1]
    assert (retired.actor, retired.reason) == ("operator", "why not")


def test_rejecting_the_live_version_restores_the_one_before(two: PolicyState) -> None:
    outcome = apply(two, moved(2, STAGE_LIVE, STAGE_REJECTED))
    assert stages(outcome.state) == {1: STAGE_LIVE, 2: STAGE_REJECTED}
    assert [(each.version, each.to_stage) for each in outcome.changes] == [(2, STAGE_REJECTED), (1, STAGE_LIVE)]  # type: ignore[union-attr]
    assert apply(outcome.state, moved(2, STAGE_REJECTED, STAGE_LIVE)).refusal


def test_rejecting_the_only_version_leaves_none_live() -> None:
    state = replay([registered(1), moved(1, STAGE_CANDIDATE, STAGE_LIVE), moved(1, STAGE_LIVE, STAGE_REJECTED)])
    assert (state.live_version, state.live_order) == (0, ())


def test_a_canary_goes_live_or_is_rejected(two: PolicyState) -> None:
    canary = replay([registered(3), moved(3, STAGE_CANDIDATE, STAGE_CANARY)])
    assert apply(canary, moved(3, STAGE_CANARY, STAGE_LIVE)).state.live_version == 3
    assert stages(apply(canary, moved(3, STAGE_CANARY, STAGE_REJECTED)).state) == {3: STAGE_REJECTED}


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (moved(1, STAGE_CANDIDATE, STAGE_LIVE), "version 1 is now STAGE_RETIRED"),
        (moved(1, STAGE_RETIRED, STAGE_LIVE, expected_live=1), "version 2 is live, not 1"),
        (moved(1, STAGE_RETIRED, STAGE_CANDIDATE), "STAGE_RETIRED → STAGE_CANDIDATE is not allowed"),
        (moved(1, STAGE_RETIRED, 99), "STAGE_RETIRED → 99 is not allowed"),  # type: ignore[arg-type]
        (moved(2, STAGE_LIVE, STAGE_LIVE), "STAGE_LIVE → STAGE_LIVE is not allowed"),
        (moved(3, STAGE_CANDIDATE, STAGE_LIVE), "version 3 is not registered"),
        (registered(2, "c"), "version 2 is taken by other weights"),
        (registered(3, parent=9), "parent_version 9 is not registered"),
        (registered(3, reference=9), "reference_version 9 is not registered"),
        (registered(0), "0 is not a version"),
        (registered(-1), "-1 is not a version"),
        (events_pb2.PolicyEvent(), "this release does not know events of this kind"),
    ],
)
def test_what_is_stale_or_wrong_is_refused_without_change(
    two: PolicyState, event: events_pb2.PolicyEvent, why: str
) -> None:
    assert apply(two, event) == Outcome(two, refusal=why)


def test_the_same_registration_again_changes_nothing(two: PolicyState) -> None:
    assert apply(two, registered(2, "b", parent=1, reference=1)) == Outcome(two)


def test_a_replica_is_known_by_its_last_report(two: PolicyState) -> None:
    state = apply(apply(two, reported("one", 1)).state, reported("one", 2)).state
    assert {name: status.policy.version for name, status in state.replicas.items()} == {"one": 2}


def test_the_api_shows_a_version_with_its_history(two: PolicyState) -> None:
    shown = as_policy(two.policies[2])
    assert (shown.version, shown.stage, shown.artifact_uri) == (2, STAGE_LIVE, "/policies/v2")
    assert [change.to_stage for change in shown.history] == [STAGE_CANDIDATE, STAGE_LIVE]
