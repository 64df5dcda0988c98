"""`alignd up --model`: finds a user's own model, in a folder or on the hub, that the first policy can be made of.

Its files are checked here, and whether the policies here began with it. It is imported next (deploy.importing), before
any process is started.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

import typer

from deploy.cli.plain import plain
from deploy.config import AligndConfig, ConfigError, load_config
from deploy.data_dir import check_usable
from deploy.importing.files import check_names, find_files
from deploy.importing.first import import_model
from deploy.importing.origin import began_with, elsewhere, is_left, policies_here
from deploy.models import ModelError
from feedback.bus.contract import BusError

_VARIABLE = "ALIGND_SERVING__INITIAL_MODEL"
# A name on the hub, with a branch, tag or commit if one is wanted: org/name@revision.
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
# Nothing that holds code. What lies in folders of a repository, or is called consolidated, are the same weights in
# another form, and pickled weights are loaded only where there are no others.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
_PICKLED = ("pytorch_model*.bin",)
_UNWANTED = ("*/*", "consolidated*")


def use_model(name: str, dry_run: bool) -> None:
    """Makes this process and its children begin with a model, which is imported next. A dry run loads nothing.

    Args:
        name: a Hugging Face model folder, or a model's name on the hub.
        dry_run: whether to load and check nothing but the names of files.

    Raises:
        ConfigError: the model cannot be served or trained, or another policy is served already; the message says what
            to do.
    """
    config = load_config()
    try:
        folder = _folder_of(name, config, dry_run)
    except ModelError as error:
        raise ConfigError(f"--model {plain(name)}: {error}") from error
    os.environ[_VARIABLE] = str(folder)


def import_named(name: str) -> None:
    """Makes a model the first policy, and starts nothing.

    Args:
        name: a Hugging Face model folder, or a model's name on the hub.

    Raises:
        ConfigError: the model cannot be served or trained, or there is another policy already.
    """
    config = load_config()
    try:
        folder = _folder_of(name, config, dry_run=False)
        if is_served_already(folder, config):
            typer.echo(plain(f"the policies in {config.policies_dir} began with this model: nothing to import"))
        else:
            import_model(folder, config)
    except ModelError as error:
        raise ConfigError(f"{plain(name)}: {error}") from error


def _folder_of(name: str, config: AligndConfig, dry_run: bool) -> Path:
    """Returns the folder of a model that may be imported; on a dry run, the folder that it would have.

    Raises:
        ModelError: the model cannot be served or trained.
        ConfigError: nothing can be written in data_dir.
    """
    folder = Path(name).expanduser().absolute()
    hub = None if folder.exists() else _HUB_NAME.fullmatch(name)
    if hub:
        folder = (config.data_dir / "models" / name.replace("/", "--")).absolute()
    elif not folder.is_dir():
        raise ModelError("it is a file; name its folder" if folder.exists() else "there is no such folder")
    else:
        check_names({path.name for path in folder.iterdir()})
    if not dry_run:
        made = not config.data_dir.exists()
        check_usable(config.data_dir)
        try:
            if not is_served_already(folder, config):
                if hub:
                    download(hub[1], hub[2], folder)
                find_files(folder)
        except ModelError:
            if made:
                with suppress(OSError):
                    config.data_dir.rmdir()
            raise
    return folder


def download(repository: str, revision: str | None, link: Path) -> None:
    """Downloads a model of the hub to Hugging Face's cache, unless it is there already, and links `link` to it.

    Raises:
        ModelError: there is no such model, it cannot be served, or the hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    wanted = list(_WANTED)
    try:
        # Without a network there may still be a copy in the cache; the download below reports all other errors.
        with suppress(errors.DryRunError):
            there = snapshot_download(repository, revision=revision, ignore_patterns="*/*", dry_run=True)
            names = {file.filename for file in there}
            check_names(names)
            if not any(name.endswith(".safetensors") for name in names):
                wanted += _PICKLED
        found = snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=list(_UNWANTED))
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
    check_names({path.name for path in Path(found).iterdir()})
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(found, target_is_directory=True)


def is_served_already(folder: Path, config: AligndConfig) -> bool:
    """Whether the policies here began with this model, or v1 of it waits for a server: there is nothing to import.

    Raises:
        ModelError: they began with another model, so this one would be ignored; or the bus does not answer.
    """
    try:
        state = policies_here(config)
    except BusError as error:
        raise ModelError(f"the bus does not answer, so nobody knows which policy is served already: {error}") from error
    if not state.live_version:
        return is_left(folder, config)
    if began_with(folder, state):
        return True
    raise ModelError(
        f"v{state.live_version} is live already, and did not begin with this model, which would be ignored; name "
        f"{elsewhere(config)} for it, or leave it out"
    )
