"""`alignd up --model`: a user's own model is found and served, or what cannot be served of it is said at once."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.config import AligndConfig, ConfigError, load_config
from deploy.importing.first import import_configured
from deploy.models import ModelError, make_tiny_llama
from deploy.own_model import import_named, is_served_already, use_model
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from policies.artifact import verify_artifact
from serving.bootstrap import imported_policy, register_first
from serving.policy_log import PolicyLog
from tests.deploy.cli.test_main import alignd
from tests.deploy.importing.folders import renamed, with_config, without
from tests.first_version import write_first
from tests.kafka_broker import free_port

# Two of these tests load vLLM, which takes a while on a busy machine.
pytestmark = pytest.mark.timeout(300)

GGUF = "model-q4.gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, with a chat template."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def mine(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(tiny, tmp_path / "mine"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "there is no such folder"),
        (without("config.json"), "there is no config.json"),
        (without("model.safetensors"), "there are no weights (model.safetensors, or several with"),
        (renamed("model.safetensors", GGUF), "its weights are GGUF alone; name the safetensors model"),
        (renamed("model.safetensors", "weights.pt"), "its weights are in a form of their own (weights.pt)"),
        (renamed("config.json", "adapter_config.json"), "it is an adapter (LoRA); merge it into its base model"),
        (without("tokenizer.json", "tokenizer_config.json"), "there is no tokenizer"),
        (with_config(num_attention_heads=0), "config.json: num_attention_heads is 0, and must be 1 or more"),
        (with_config(architectures=[]), "config.json names no architecture"),
        (with_config(quantization_config={"quant_method": "gptq"}), "its weights are quantised (gptq)"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no JSON object"),
    ],
)
def test_what_cannot_be_served_is_said(
    mine: Path, spoil: Callable[[Path], object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGND_DATA_DIR", str(mine.parent / "var"))
    spoil(mine)
    with pytest.raises(ConfigError) as raised:
        use_model(str(mine), dry_run=False)
    assert str(raised.value).startswith(f"--model {mine}: {says}")
    assert "ALIGND_SERVING__INITIAL_MODEL" not in os.environ


def test_a_name_that_breaks_a_line_is_said_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^mi\\nne: there is no such folder$"):
        import_named("mi\nne")


def test_nothing_is_started_for_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / GGUF).touch()
    done = alignd(tmp_path, "up", "--model", "mine")
    assert done.returncode == 2
    assert done.stderr == (
        "configuration\n--model mine: its weights are GGUF alone; name the safetensors model that they were made from\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_dry_run_names_the_folder_and_loads_nothing(tiny: Path, tmp_path: Path) -> None:
    for name, folder in ((str(tiny), tiny), ("org/name@v2", tmp_path / "var" / "models" / "org--name@v2")):
        done = alignd(tmp_path, "up", "--model", name, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert f'initial_model = "{folder}"' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_chat_template_is_served_with_a_word_on_it(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGND_DATA_DIR", str(tmp_path / "var"))
    monkeypatch.delenv("ALIGND_SERVING__INITIAL_MODEL", raising=False)
    (mine / "chat_template.jinja").unlink()
    # A folder's name can hold what would change the terminal.
    mine = mine.rename(mine.with_name("mi\x1b[31mne"))
    use_model(str(mine), dry_run=False)
    assert load_config().serving.initial_model == mine
    import_configured(load_config())
    told = capsys.readouterr().err
    assert "mi\\x1b[31mne: it has no chat template, so it serves plain text alone" in told
    assert "\x1b[31mne" not in told
    assert verify_artifact(tmp_path / "var" / "policies" / "v1").probes


NOT_FOR_VLLM = {
    "unknown architecture": (
        with_config(architectures=["OursForCausalLM"]),
        "vLLM does not take it: Model architectures ['OursForCausalLM'] are not supported for now",
    ),
    "unknown type": (
        with_config(model_type="ours"),
        "has model type `ours` but Transformers does not recognize this architecture",
    ),
    "length that the model does not take": (
        with_config(max_position_embeddings=128),
        "serving.max_model_len: 1024 is more than the model takes (128); lower it, or leave it out",
    ),
    "classifier": (
        with_config(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification is no model that continues a prompt",
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "its tokenizer does not load: ",
    ),
}
# All in one process, which loads vLLM once.
TRY_ALL = """
import json, sys
from pathlib import Path
from serving.config import ServingConfig
from serving.vllm_engine import EngineError
from serving.vllm_trial import try_model
for folder in sys.argv[1:]:
    try:
        print(json.dumps(try_model(Path(folder), ServingConfig(max_model_len=1024))))
    except EngineError as error:
        print(json.dumps(str(error)))
"""


def test_what_vllm_would_not_take_is_said_in_a_sentence(tiny: Path, tmp_path: Path) -> None:
    folders = [tiny]
    for name, (spoil, _) in NOT_FOR_VLLM.items():
        folders.append(Path(shutil.copytree(tiny, tmp_path / name)))
        spoil(folders[-1])
    command = [sys.executable, "-c", TRY_ALL, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    whole, *refused = (json.loads(line) for line in done.stdout.splitlines() if line[:1] in {'"', "n"})
    assert whole is None
    for said, (name, (_, says)) in zip(refused, NOT_FOR_VLLM.items(), strict=True):
        assert says in said, name
        assert len(said) < 250


async def imported(config: AligndConfig, model: Path) -> None:
    """Makes a model version 1 and registers it, as a server does at its first start."""
    write_first(config.policies_dir, model)
    with contextlib.closing(open_bus(config.bus_url)) as bus:
        bus.create_topics(TOPICS)
        policies = PolicyLog(bus)
        await policies.start()
        await register_first(imported_policy(config.policies_dir), policies)
        await policies.stop()


def test_where_another_policy_is_live_the_model_is_not_ignored_in_silence(tiny: Path, tmp_path: Path) -> None:
    config = AligndConfig(data_dir=tmp_path / "var")
    assert not is_served_already(tiny, config)
    asyncio.run(imported(config, tiny))
    assert is_served_already(tiny, config)
    other = make_tiny_llama(tmp_path / "other", seed=1)
    for folder in (other, tmp_path / "var" / "models" / "never--loaded"):
        with pytest.raises(
            ModelError, match=r"v1 is live already, and did not begin with this model.* ALIGND_DATA_DIR"
        ):
            is_served_already(folder, config)
    with pytest.raises(ModelError, match="an ALIGND_BUS and ALIGND_STORE of its own"):
        is_served_already(other, AligndConfig(data_dir=tmp_path / "else", bus=config.bus_url))


def test_an_import_that_the_bus_knows_nothing_of_is_not_taken_for_another_model(tiny: Path, tmp_path: Path) -> None:
    config = AligndConfig(data_dir=tmp_path / "var")
    asyncio.run(imported(config, tiny))
    (tmp_path / "var" / "bus.db").rename(tmp_path / "bus.db")
    assert is_served_already(tiny, config)
    assert not is_served_already(make_tiny_llama(tmp_path / "other", seed=1), config)


def test_a_bus_that_does_not_answer_is_said(tiny: Path, tmp_path: Path) -> None:
    config = AligndConfig(data_dir=tmp_path, bus=f"kafka://127.0.0.1:{free_port()}")
    with pytest.raises(ModelError, match="the bus does not answer, so nobody knows which policy is served already"):
        is_served_already(tiny, config)
