"""One real server, with vLLM on a tiny Llama, that the tests of this room share; and stubs to talk to it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignd.v1.policy_service_pb2 import RollbackRequest
from deploy.models import make_tiny_llama
from tests.serving.calls import END_TOKEN_IDS, TIMEOUT_SECONDS, Stubs
from tests.serving.processes import Server, running_server
from tests.serving.rollout import live_version, wait_served


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server. It must end cleanly after the last test. Its model has two end tokens, as many have."""
    folder = tmp_path_factory.mktemp("server")
    generation = make_tiny_llama(folder / "tiny") / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": END_TOKEN_IDS}))
    with running_server(folder) as running:
        yield running


@pytest.fixture
def stubs(server: Server) -> Iterator[Stubs]:
    """Stubs to it, on a channel of their own."""
    with server.channel() as channel:
        yield Stubs(channel)


@pytest.fixture(scope="session")
def tiny_llama(server: Server) -> Path:
    """The folder of the version that it was started on."""
    return server.data_dir / "policies" / "v1"


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
