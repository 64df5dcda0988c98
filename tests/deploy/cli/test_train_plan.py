"""The plan as an operator reads it: what it is of, what it says, and what it says where it cannot be made."""

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from deploy.cli import train_plan
from deploy.cli.train_plan import FoundModel, amount, bar, duration, find_model, print_plan, size
from deploy.config import AligndConfig
from deploy.models import make_tiny_llama
from serving.config import ServingConfig
from tests.kafka_broker import free_port
from training.config import TrainingConfig
from training.planning.hardware import Hardware
from training.planning.model_size import read_model
from training.planning.plan import make_plan
from training.recipes import load_recipe

MACHINE = Hardware("a machine", bandwidth_gb_s=20.0, matmul_gflop_s=1000.0, memory_gib=16.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def config_of(folder: Path, initial_model: Path | None = None, recipe: str = "tiny") -> AligndConfig:
    """A configuration at whose address nothing answers."""
    return AligndConfig(
        data_dir=folder,
        address=f"127.0.0.1:{free_port()}",
        serving=ServingConfig(initial_model=initial_model),
        training=load_recipe(recipe),
    )


def printed(config: AligndConfig, *arguments: Any, **named: Any) -> tuple[bool, str]:
    console = Console(file=StringIO(), width=140, highlight=False)
    made = print_plan(config, *arguments, console=console, **{"hardware": MACHINE, **named})
    assert isinstance(console.file, StringIO)
    return made, console.file.getvalue()


def test_the_plan_shows_every_phase_part_and_total(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path)
    made, text = printed(config, model)
    assert made
    plan = make_plan(config.training, read_model(model), MACHINE)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for phase in plan.round:
        share = 3 * phase.seconds / plan.run_seconds
        cells = (amount(phase.tokens), f"{phase.flops / 1e12:,.2f}", duration(phase.seconds), f"{share:.0%}")
        assert " ".join((phase.name, *cells)) in lines
    assert f"Time: about {duration(plan.run_seconds)} for the run" in lines
    assert f"Memory at its fullest (update): {plan.memory.peak / 2**30:.1f} of 16.0 GiB" in lines
    assert any(line.startswith("engine: KV cache 64.0 MiB █") for line in lines)
    assert "layers, 1 of the policy's own 37.0 k -" in lines
    trained, frozen = (sum(getattr(part, kind) for part in plan.parameters) for kind in ("trained", "frozen"))
    assert f"all {amount(trained)} {amount(frozen)}" in lines
    assert "machine a machine: reads 20 GB/s, multiplies bf16 at 1,000 GFLOP/s, 16.0 GiB" in lines
    assert "!" not in text


def test_shares_of_the_run_add_up(tmp_path: Path, model: Path) -> None:
    _, text = printed(config_of(tmp_path), model)
    shares = [int(line.split()[-1].removesuffix("%")) for line in text.splitlines() if line.rstrip().endswith("%")]
    assert len(shares) == 5
    assert sum(shares) == pytest.approx(100, abs=3)


def test_warnings_are_shown_whole(tmp_path: Path, model: Path) -> None:
    small = Hardware("small", 20.0, 1000.0, memory_gib=0.01)
    _, text = printed(config_of(tmp_path, recipe="smollm2"), model, hardware=small)
    flat = " ".join(text.split())
    for warning in make_plan(TrainingConfig(), read_model(model), small).warnings:
        assert f"! {warning}" in flat
    assert "does not fit" in flat
    assert "ppo.num_frozen_layers: the model has 2 layers" in flat


def test_several_devices_are_said_to_have_a_process_each(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path)
    several = config.model_copy(update={"training": config.training.model_copy(update={"num_processes": 4})})
    _, text = printed(several, model, hardware=Hardware("some GPU", 20.0, 1000.0, 16.0, num_devices=4))
    assert "4 × some GPU, a process each" in text
    assert "16.0 GiB on each device" in text


def test_with_no_model_it_says_what_to_set(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    made, text = printed(config)
    assert not made
    assert f"no server answers at {config.address}" in text
    assert "serving.initial_model is not set" in text


def test_a_model_that_cannot_be_planned_for_is_named(tmp_path: Path) -> None:
    made, text = printed(config_of(tmp_path / "data", initial_model=tmp_path / "none"))
    assert not made
    assert (
        f"initial_model, which becomes v1 cannot be planned for: there is no config.json at {tmp_path / 'none'}" in text
    )


def test_the_newest_version_on_disk_goes_before_the_initial_model(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, initial_model=model)
    assert find_model(config) == FoundModel(model, "serving.initial_model, which becomes v1")
    for name in ("v9", "v10", "v11", "vx"):
        (config.policies_dir / name).mkdir(parents=True)
    for name in ("v9", "v10", "vx"):
        (config.policies_dir / name / "config.json").write_bytes((model / "config.json").read_bytes())
    found = find_model(config)
    assert found is not None
    assert found.folder == config.policies_dir / "v10"
    made, text = printed(config)
    assert made
    assert "v10, the newest on disk, since no server says which is live" in text


def test_the_live_policy_goes_before_all(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def get(request: Any, timeout: float) -> Any:
        asked.append(request.policy)
        return SimpleNamespace(policy=SimpleNamespace(version=4, artifact_uri=model.as_uri()))

    class Connected:
        policies = SimpleNamespace(GetPolicy=get)

        def __enter__(self) -> "Connected":
            return self

        def __exit__(self, *error: object) -> None:
            return None

    monkeypatch.setattr(train_plan, "connect", lambda address: Connected())
    assert find_model(config_of(tmp_path)) == FoundModel(model, "v4, which is live")
    assert asked == ["live"]


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (size(3.5 * 2**30), "3.50 GiB"),
        (size(5 * 2**20), "5.0 MiB"),
        (amount(0), "-"),
        (amount(999), "999"),
        (amount(134_515_008), "134.5 M"),
        (amount(7_248_023_552), "7.2 G"),
        (duration(0.0123), "12.3 ms"),
        (duration(90), "90.0 s"),
        (duration(600), "10.0 min"),
        (duration(3 * 3600), "3.0 h"),
        (duration(4 * 86400), "4.0 days"),
        (bar(0.5), "█" * 12),
        (bar(0.001), "█"),
    ],
)
def test_numbers_read_as_people_write_them(shown: str, text: str) -> None:
    assert shown == text
