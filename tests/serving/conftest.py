"""One real server, with vLLM on a tiny Llama, that the tests of this room share; and stubs to talk to it."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from alignd.v1.policy_service_pb2 import RollbackRequest
from tests.serving.calls import TIMEOUT_SECONDS, Stubs
from tests.serving.processes import Server, running_server
from tests.serving.rollout import live_version, wait_served


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server. It must end cleanly after the last test."""
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def stubs(server: Server) -> Iterator[Stubs]:
    """Stubs to it, on a channel of their own."""
    with grpc.insecure_channel(server.address) as channel:
        yield Stubs(channel)


@pytest.fixture(scope="session")
def tiny_llama(server: Server) -> Path:
    """The folder of the model that it was started on."""
    return Path(server.environment["ALIGND_SERVING__INITIAL_MODEL"])


@pytest.fixture
def root(server: Server) -> Path:
    """The folder of all versions."""
    return server.data_dir / "policies"


@pytest.fixture
def version_1_again(stubs: Stubs) -> Iterator[None]:
    """Leaves version 1 live and served."""
    yield
    # While a swap is under way, the replica's report would still name version 1.
    wait_served(stubs, live_version(stubs))
    stubs.policies.Rollback(RollbackRequest(version=1, actor="test"), timeout=TIMEOUT_SECONDS)
    wait_served(stubs, 1)
