"""How the trainer takes what serving answers when it hands a version over."""

from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tests.training.serving_errors import Answer
from training.runs.policy_client import PolicyClient


def client_that_hears(monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode) -> PolicyClient:
    """A client whose promotions are answered so; it says what it asked for in `asked`."""

    def promote(request: Any, **options: Any) -> None:
        assert (request.version, request.expected_live_version) == (3, 2)
        raise Answer(code, "no")

    client = PolicyClient("127.0.0.1:1")
    monkeypatch.setattr(client, "_service", SimpleNamespace(Promote=promote))
    return client


@pytest.mark.parametrize("code", [grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION])
def test_a_version_that_another_overtook_stays_a_candidate(
    monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode
) -> None:
    """Somebody promoted another since the run began, or this one is no candidate any more: that is no error."""
    with client_that_hears(monkeypatch, code) as client:
        assert client.promote(3, 2, "a run") is False


def test_a_server_that_is_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with client_that_hears(monkeypatch, grpc.StatusCode.UNAVAILABLE) as client, pytest.raises(Answer):
        client.promote(3, 2, "a run")
