"""A tiny policy for benchmarks that are tested from end to end."""

from pathlib import Path

import pytest

from deploy.models import make_tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
