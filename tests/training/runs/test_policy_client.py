"""How the trainer reacts to serving's answers when it asks for a version to go live."""

from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from policies.server_connection import ServerConnection
from tests.training.serving_errors import Answer
from training.runs.policy_client import PolicyClient


def client_answered_with(monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode) -> PolicyClient:
    """Returns a client whose promotions are answered with this code; `asked` has what it asked for."""

    def promote(request: Any, **options: Any) -> None:
        assert (request.version, request.expected_live_version) == (3, 2)
        raise Answer(code, "no")

    client = PolicyClient(ServerConnection("127.0.0.1:1"))
    monkeypatch.setattr(client, "_service", SimpleNamespace(Promote=promote))
    return client


@pytest.mark.parametrize("code", [grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION])
def test_a_version_that_another_overtook_stays_a_candidate(
    monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode
) -> None:
    """It is no error if somebody has promoted another since the run began, or this one is no candidate any more."""
    with client_answered_with(monkeypatch, code) as client:
        assert client.promote(3, 2, "a run") is False


def test_a_server_that_is_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with client_answered_with(monkeypatch, grpc.StatusCode.UNAVAILABLE) as client, pytest.raises(Answer):
        client.promote(3, 2, "a run")
