"""A real gateway before the shared server, and OpenAI's own client to it."""

import urllib.error
import urllib.request
from collections.abc import Iterator

import openai
import pytest

from tests.serving.processes import Server, end, start, wait_until


def answers(url: str) -> bool:
    """Whether something answers there, well or not."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@pytest.fixture(scope="session")
def gateway(server: Server) -> Iterator[str]:
    """The URL of a gateway to the shared server."""
    process = start("gateway", server.environment)
    url = f"http://127.0.0.1:{server.environment['ALIGND_GATEWAY__PORT']}"
    try:
        wait_until(lambda: answers(f"{url}/health"), 180, "the gateway", process)
        yield url
    finally:
        process.terminate()
        assert end(process) == 0


@pytest.fixture
def client(gateway: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which sends a key in any case."""
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found
