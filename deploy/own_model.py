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

VARIABLE = "ALIGND_SERVING__INITIAL_MODEL"
# A name on the hub, with a branch, tag or commit if one is wanted: org/name@revision.
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
# What a policy version is made of: nothing that could hold code or would have to be unpickled. What lies in folders of
# a repository, or is called consolidated, are the same weights in another form.
WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
UNWANTED = ("*/*", "consolidated*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model"}
BUS_TIMEOUT_SECONDS = 15.0
NO_TEMPLATE = (
    "it has no chat template, so it serves plain text alone (Prompt.text): a request with messages is refused until "
    "chat_template.jinja lies beside its tokenizer"
)


def use_model(name: str, dry_run: bool) -> None:
    """Has this process and its children begin with a model; on a dry run nothing is loaded for it.

    Args:
        name: a folder of Hugging Face's form, or a model's name on the hub.
        dry_run: whether nothing may be done.

    Raises:
        ConfigError: it cannot be served, or another policy is; says why and what to do.
    """
    config = load_config()
    try:
        folder = _folder_of(name, config, dry_run)
    except ModelError as error:
        raise ConfigError(f"--model {name}: {error}") from error
    os.environ[VARIABLE] = str(folder)


def _folder_of(name: str, config: AligndConfig, dry_run: bool) -> Path:
    """Returns the folder of a model that can be served; on a dry run, where it would be."""
    folder = Path(name).expanduser().absolute()
    hub = None if folder.exists() else HUB_NAME.fullmatch(name)
    if hub:
        folder = (config.data_dir / "models" / name.replace("/", "--")).absolute()
    elif not folder.is_dir():
        raise ModelError("it is a file; name its folder" if folder.exists() else "there is no such folder")
    else:
        check_files({path.name for path in folder.iterdir()})
    if not dry_run and not is_served_already(folder, config):
        if hub:
            download(hub[1], hub[2], folder)
        check_config(folder)
        if not has_chat_template(folder, config):
            typer.echo(f"--model {name}: {NO_TEMPLATE}", err=True)
    return folder


def check_files(names: Collection[str]) -> None:
    """Refuses what alignd cannot serve by the names of a model's files.

    Raises:
        ModelError: there are no weights that can be served, or something that belongs to them is missing.
    """
    if "adapter_config.json" in names:
        raise ModelError("it is an adapter (LoRA); merge it into its base model, and name the folder of the result")
    suffixes = {Path(name).suffix for name in names}
    if ".safetensors" not in suffixes:
        if ".gguf" in suffixes:
            raise ModelError("its weights are GGUF alone; name the safetensors model that they were made from")
        pickled = sorted(name for name in names if Path(name).suffix in PICKLES)
        if pickled:
            raise ModelError(
                f"its weights are pickled alone ({pickled[0]}), and to unpickle them could run anybody's code; "
                "save them as safetensors, by transformers' save_pretrained"
            )
        raise ModelError("there are no weights (*.safetensors)")
    if "config.json" not in names:
        raise ModelError("there is no config.json")
    if not TOKENIZERS & set(names):
        raise ModelError("there is no tokenizer, such as tokenizer.json")


def check_config(folder: Path) -> None:
    """Refuses a model whose config.json names nothing that can be served, or whose weights are not all there.

    Raises:
        ModelError: says what is wrong.
    """
    config = _read_json(folder / "config.json")
    if not config.get("architectures"):
        raise ModelError("config.json names no architecture (architectures)")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(
            f"its weights are quantised ({method}), and cannot be learned on; name the model in bf16 or fp32"
        )
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


def has_chat_template(folder: Path, config: AligndConfig) -> bool:
    """Tries all of a model but its weights on vLLM, in a process that ends; returns whether it can be chatted with.

    Raises:
        ModelError: vLLM does not take it, or its tokenizer does not load.
    """
    from serving.vllm_engine import EngineError, try_model

    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            return process.submit(try_model, folder, config.serving).result()
    except EngineError as error:
        raise ModelError(str(error)) from error
    except BrokenProcessPool as error:
        raise ModelError("vLLM died of looking at it; what it said is above") from error


def download(repository: str, revision: str | None, link: Path) -> None:
    """Loads a model of the hub into Hugging Face's cache, or takes what is there already, and links `link` to it.

    Raises:
        ModelError: there is none that may be had or served, or the hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        # Without a network there may be a copy here all the same; what else is wrong comes to light after it.
        with suppress(errors.DryRunError):
            there = snapshot_download(repository, revision=revision, ignore_patterns="*/*", dry_run=True)
            check_files({file.filename for file in there})
        found = snapshot_download(
            repository, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
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
        # Those of the hub's library, of the one that it asks the network by, and of the disk.
        why = str(error.__cause__ or error).splitlines()[0]
        raise ModelError(
            f"there is no such folder here, and the hub's cannot be loaded ({why}); load it where there is a network, "
            "and name its folder"
        ) from error
    check_files({path.name for path in Path(found).iterdir()})
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(found, target_is_directory=True)


def is_served_already(folder: Path, config: AligndConfig) -> bool:
    """Whether the policies here began with this very model, so that there is nothing to import.

    Raises:
        ModelError: they began with another, so the model would be ignored; or the bus does not answer.
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
        # A start that was interrupted left it, or a bus that is gone. The server would take it for the model's import.
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
    """Returns what the bus says of policies."""
    if not config.bus and not (config.data_dir / "bus.db").exists():
        return PolicyState()
    try:
        with closing(await asyncio.to_thread(open_bus, config.bus_url)) as bus:
            await asyncio.to_thread(bus.create_topics, TOPICS)
            policies = PolicyLog(bus)
            try:
                await asyncio.wait_for(policies.start(), BUS_TIMEOUT_SECONDS)
            finally:
                await policies.stop()
            return policies.state
    except (BusError, TimeoutError) as error:
        why = str(error) or "timed out"
        raise ModelError(f"the bus does not answer, so it is not known what is served already: {why}") from error


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
