"""`alignd up --model ORG/NAME`, against a fake hub: what is loaded of a model, and what is said when it cannot be."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.config import AligndConfig
from deploy.models import make_tiny_llama
from deploy.own_model import is_served_already
from tests.deploy.cli.test_main import alignd
from tests.deploy.fake_hub import Hub, running_hub
from tests.deploy.test_own_model import imported
from tests.kafka_broker import free_port

GGUF = "model-q4.gguf"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path) as running:
        yield running


def test_a_model_of_the_hub_is_loaded_once_and_without_what_is_not_served(hub: Hub, tmp_path: Path) -> None:
    tiny = make_tiny_llama(tmp_path / "tiny")
    folder = Path(shutil.copytree(tiny, hub.root / "org" / "name"))
    for unwanted in ("pytorch_model.bin", "code.py", "onnx/model.safetensors", "consolidated.safetensors"):
        (folder / unwanted).parent.mkdir(exist_ok=True)
        (folder / unwanted).write_text("unwanted")
    link = tmp_path / "var" / "models" / "org--name"
    assert hub.download("org/name", link) == ""
    assert {path.name: path.read_bytes() for path in link.iterdir()} == {
        path.name: path.read_bytes() for path in tiny.iterdir()
    }
    # Without a network the copy does.
    asked = len(hub.asked)
    assert hub.download("org/name", link, offline=True) == ""
    assert len(hub.asked) == asked
    config = AligndConfig(data_dir=tmp_path / "var")
    asyncio.run(imported(config, link))
    assert is_served_already(link, config)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/gguf", "its weights are GGUF alone"),
        ("org/gguf@v9", "the hub's org/gguf has no revision v9"),
        ("org/none", "there is no such folder here, nor such a model on the hub"),
        ("gated/name", "accept the model's terms there, and set HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_have_to_give_is_said_before_anything_is_loaded(
    hub: Hub, tmp_path: Path, name: str, says: str
) -> None:
    (hub.root / "org" / "gguf").mkdir(parents=True)
    (hub.root / "org" / "gguf" / GGUF).write_text("GGUF")
    said = hub.download(name, tmp_path / "link")
    assert said.startswith("deploy.models.ModelError: ")
    assert says in said
    assert not [asked for method, asked in map(str.split, hub.asked) if method == "GET" and "/resolve/" in asked]
    assert not (tmp_path / "link").exists()


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_out_of_reach_is_said(offline: bool, tmp_path: Path) -> None:
    variables = {"HF_HUB_OFFLINE": str(int(offline)), "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    done = alignd(tmp_path, "up", "--model", "org/name", HF_HOME=str(tmp_path / "hf"), **variables)
    assert done.returncode == 2
    assert "--model org/name: there is no such folder here, and the hub's cannot be loaded (" in done.stderr
    assert done.stderr.rstrip().endswith("load it where there is a network, and name its folder")
    assert not (tmp_path / "var").exists()
