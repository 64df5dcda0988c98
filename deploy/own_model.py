"""`alignd up --model`: finds a user's own model, in a folder or on the hub, and says what of it cannot be served.

All is checked before any process is started: which files there are, what config.json says, whether vLLM takes the
architecture and the tokenizer loads, and whether another policy is served already.
"""

import asyncio
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from pathlib import Path

import typer

from alignd.v1.policy_manifest_pb2 import PolicyManifest
from deploy.config import AligndConfig, ConfigError, load_config
from deploy.models import ModelError
from feedback.bus.contract import BusError
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from policies.artifact import ArtifactError, read_manifest, weight_files
from policies.state import PolicyState
from serving.policy_log import PolicyLog

_VARIABLE = "ALIGND_SERVING__INITIAL_MODEL"
# A name on the hub, with a branch, tag or commit if one is wanted: org/name@revision.
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
# What a policy version is made of: nothing that could hold code or would have to be unpickled. What lies in folders of
# a repository, or is called consolidated, are the same weights in another form.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
_UNWANTED = ("*/*", "consolidated*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model"}
_BUS_TIMEOUT_SECONDS = 15.0
_NO_TEMPLATE = (
    "it has no chat template, so it serves plain text alone (Prompt.text): a request with messages is refused until "
    "chat_template.jinja lies beside its tokenizer"
)


def use_model(name: str, dry_run: bool) -> None:
    """Makes this process and its children begin with a model. A dry run loads nothing.

    Args:
        name: a Hugging Face model folder, or a model's name on the hub.
        dry_run: whether to load and check nothing but the names of files.

    Raises:
        ConfigError: the model cannot be served, or another policy is served already; the message says what to do.
    """
    config = load_config()
    try:
        folder = _folder_of(name, config, dry_run)
    except ModelError as error:
        raise ConfigError(f"--model {name}: {error}") from error
    os.environ[_VARIABLE] = str(folder)


def _folder_of(name: str, config: AligndConfig, dry_run: bool) -> Path:
    """Returns the folder of a model that can be served; on a dry run, the folder that it would have.

    Raises:
        ModelError: the model cannot be served.
    """
    folder = Path(name).expanduser().absolute()
    hub = None if folder.exists() else _HUB_NAME.fullmatch(name)
    if hub:
        folder = (config.data_dir / "models" / name.replace("/", "--")).absolute()
    elif not folder.is_dir():
        raise ModelError("it is a file; name its folder" if folder.exists() else "there is no such folder")
    else:
        _check_files({path.name for path in folder.iterdir()})
    if not dry_run and not is_served_already(folder, config):
        if hub:
            download(hub[1], hub[2], folder)
        _check_config(folder)
        if not _has_chat_template(folder, config):
            typer.echo(f"--model {name}: {_NO_TEMPLATE}", err=True)
    return folder


def _check_files(names: Collection[str]) -> None:
    """Checks by the names of a model's files that alignd can serve it.

    Raises:
        ModelError: there are no weights that can be served, or a file that they need is missing.
    """
    if "adapter_config.json" in names:
        raise ModelError("it is an adapter (LoRA); merge it into its base model, and name the folder of the result")
    suffixes = {Path(name).suffix for name in names}
    if ".safetensors" not in suffixes:
        if ".gguf" in suffixes:
            raise ModelError("its weights are GGUF alone; name the safetensors model that they were made from")
        pickled = sorted(name for name in names if Path(name).suffix in _PICKLES)
        if pickled:
            raise ModelError(
                f"its weights are pickled alone ({pickled[0]}), and to unpickle them could run anybody's code; "
                "save them as safetensors, by transformers' save_pretrained"
            )
        raise ModelError("there are no weights (*.safetensors)")
    if "config.json" not in names:
        raise ModelError("there is no config.json")
    if not _TOKENIZERS & set(names):
        raise ModelError("there is no tokenizer, such as tokenizer.json")


def _check_config(folder: Path) -> None:
    """Checks that config.json names a model that can be served, and that all files of weights are there.

    Raises:
        ModelError: config.json or a file of weights is missing or cannot be used.
    """
    config = _read_json(folder / "config.json")
    if not config.get("architectures"):
        raise ModelError("config.json names no architecture (architectures)")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(f"its weights are quantised ({method}), and cannot be trained; name the model in bf16 or fp32")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        names = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ModelError(f"{len(missing)} of its files of weights are missing, such as {missing[0]}")


def _read_json(path: Path) -> dict[str, object]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise ModelError(f"{path.name} holds no JSON object")
    return read


def _has_chat_template(folder: Path, config: AligndConfig) -> bool:
    """Tries a model on vLLM, without its weights and in a process of its own; returns whether it has a chat template.

    Raises:
        ModelError: vLLM does not support the model, or its tokenizer does not load.
    """
    from serving.vllm_engine import EngineError, try_model

    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            return process.submit(try_model, folder, config.serving).result()
    except EngineError as error:
        raise ModelError(str(error)) from error
    except BrokenProcessPool as error:
        raise ModelError("vLLM died when it tried the model; its messages are above") from error


def download(repository: str, revision: str | None, link: Path) -> None:
    """Downloads a model of the hub to Hugging Face's cache, unless it is there already, and links `link` to it.

    Raises:
        ModelError: there is no such model, it cannot be served, or the hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        # Without a network there may still be a copy in the cache; the download below reports all other errors.
        with suppress(errors.DryRunError):
            there = snapshot_download(repository, revision=revision, ignore_patterns="*/*", dry_run=True)
            _check_files({file.filename for file in there})
        found = snapshot_download(
            repository, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
        )
    except ModelError:
        raise
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub's {repository} has no revision {revision}") from error
    except errors.GatedRepoError as error:
        raise ModelError("the hub asks who you are: accept the model's terms there, and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            "there is no such folder here, nor such a model on the hub; for a private one set HF_TOKEN"
        ) from error
    except Exception as error:
        # Errors of the hub's library, of its HTTP library, and of the disk.
        why = str(error.__cause__ or error).splitlines()[0]
        raise ModelError(
            f"there is no such folder here, and the hub's cannot be loaded ({why}); load it where there is a network, "
            "and name its folder"
        ) from error
    _check_files({path.name for path in Path(found).iterdir()})
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(found, target_is_directory=True)


def is_served_already(folder: Path, config: AligndConfig) -> bool:
    """Whether the policies here began with this model, so that there is nothing to import.

    Raises:
        ModelError: they began with another model, so this one would be ignored; or the bus does not answer.
    """
    elsewhere = "another ALIGND_DATA_DIR"
    if config.bus or config.store:
        elsewhere += ", with an ALIGND_BUS and ALIGND_STORE of its own,"
    state = asyncio.run(_policies(config))
    if state.live_version:
        imported = [each.manifest for each in state.policies.values() if not each.manifest.HasField("training")]
        if any(_holds(folder, manifest) for manifest in imported):
            return True
        raise ModelError(
            f"v{state.live_version} is live already, and did not begin with this model, which would be ignored; name "
            f"{elsewhere} for it, or leave --model out"
        )
    left = config.policies_dir / "v1"
    if left.exists():
        # An interrupted start left it, or its bus is gone. The server would take it for the import of this model.
        try:
            same = _holds(folder, read_manifest(left))
        except ArtifactError:
            same = False
        if not same:
            raise ModelError(
                f"{left} holds another model, which the bus does not know; remove it, or name {elsewhere} for this one"
            )
    return False


async def _policies(config: AligndConfig) -> PolicyState:
    """Returns the state of all policies, from the bus.

    Raises:
        ModelError: the bus does not answer.
    """
    if not config.bus and not (config.data_dir / "bus.db").exists():
        return PolicyState()
    try:
        with closing(await asyncio.to_thread(open_bus, config.bus_url)) as bus:
            await asyncio.to_thread(bus.create_topics, TOPICS)
            policies = PolicyLog(bus)
            try:
                await asyncio.wait_for(policies.start(), _BUS_TIMEOUT_SECONDS)
            finally:
                await policies.stop()
            return policies.state
    except (BusError, TimeoutError) as error:
        why = str(error) or "timed out"
        raise ModelError(f"the bus does not answer, so nobody knows which policy is served already: {why}") from error


def _holds(folder: Path, manifest: PolicyManifest) -> bool:
    """Whether the weights in a folder are those of a version, byte by byte."""
    weights = {file.path: file for file in weight_files(manifest.files)}
    found = {path.name: path for path in folder.glob("*.safetensors")}
    if weights.keys() != found.keys():
        return False
    if any(path.stat().st_size != weights[name].size_bytes for name, path in found.items()):
        return False
    return all(_sha256(path) == weights[name].sha256 for name, path in found.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
