"""Before anything starts, what serving and training need is held against the memory and the disk that there are."""

import json
from pathlib import Path

import pytest
import torch

from deploy import capacity
from deploy.capacity import Need, check, fitted_settings
from deploy.cli import processes
from deploy.config import AligndConfig, ConfigError
from policies import precision
from policies.host_memory import HostMemory
from tests.training.planning.model_configs import CONFIGS, SMOLLM2
from training.models import device

GIB = 1 << 30
BOTH = ("serve", "relay", "ingest", "train")


def config_of(tmp_path: Path) -> AligndConfig:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[SMOLLM2]))
    return AligndConfig.model_validate({"data_dir": tmp_path, "serving": {"initial_model": tmp_path, "port": 1}})


def within(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """Stands in for a container with this limit, which only a test with the rights of root could make."""
    monkeypatch.setattr(capacity, "host_memory", lambda: HostMemory(int(gib * GIB), int(gib * GIB), is_limited=True))
    # In fp32 everything needs more, and what fits would depend on the machine that tests it.
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)


def test_where_there_is_room_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    within(monkeypatch, 24)
    assert fitted_settings(config_of(tmp_path), BOTH) == {}


def test_a_recipe_is_fitted_to_a_laptop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    within(monkeypatch, 7)
    found = fitted_settings(config_of(tmp_path), BOTH)
    assert found.keys() == {"ALIGND_TRAINING__PPO__MICRO_BATCH_TOKENS"}
    assert "ppo.micro_batch_tokens" in caplog.text
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert AligndConfig().training.ppo.micro_batch_tokens == int(next(iter(found.values()))) < 4096


def test_what_cannot_fit_is_refused_with_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    within(monkeypatch, 4)
    with pytest.raises(ConfigError, match=r"memory: serving and training will need .* control group is 4\.0"):
        fitted_settings(config_of(tmp_path), BOTH)
    # Serving alone fits there.
    assert fitted_settings(config_of(tmp_path), ("serve", "relay", "ingest")) == {}


def test_fine_tuning_asks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are trained, in fp32, beside the reference policy and an engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGND_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ALIGND_SERVING__INITIAL_MODEL", str(config_of(tmp_path).serving.initial_model))
    monkeypatch.setenv("ALIGND_SERVING__PORT", "1")
    within(monkeypatch, 6)
    with pytest.raises(ConfigError, match=r"memory: fine-tuning will need .* training\.sft\.micro_batch_size"):
        processes.sft()


def test_what_a_gpu_gets_passes_through_the_hosts_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "training_device", lambda: torch.device("cuda"))
    within(monkeypatch, 3)
    with pytest.raises(ConfigError, match=r"memory: serving and training will need .* training\.ppo\.lora"):
        fitted_settings(config_of(tmp_path), BOTH)
    assert fitted_settings(config_of(tmp_path), ["sft"]) == {}
    within(monkeypatch, 6)
    assert fitted_settings(config_of(tmp_path), BOTH) == {}


def test_too_small_a_disk_is_refused(tmp_path: Path) -> None:
    need = Need(memory=1.0, disk=2.0 * GIB, fields=(), settings={}, changes=())
    with pytest.raises(ConfigError, match=r"data_dir: serving .* 2\.0 GiB .* 1\.0 GiB are free"):
        check(need, HostMemory(4096, 4096), 1.0 * GIB, ("serve",))


def test_a_model_that_nobody_has_named_yet_is_not_planned_for(tmp_path: Path) -> None:
    assert fitted_settings(AligndConfig.model_validate({"data_dir": tmp_path, "serving": {"port": 1}}), BOTH) == {}
