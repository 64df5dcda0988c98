"""A tiny policy to train on, made once for all tests."""

from pathlib import Path

import pytest
import torch

from deploy.models import make_tiny_llama
from training.models.policy import SharedLayers, load_model

# A tiny model's matrices are not worth a second thread, and tests share the machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training computes in fp32, as on a CPU without instructions for bf16, so that it can be compared closely."""
    monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", lambda: False)


@pytest.fixture
def shared(tiny_folder: Path) -> SharedLayers:
    return SharedLayers(load_model(tiny_folder))
