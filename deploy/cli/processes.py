"""The verbs that are one process each: server, gateway, relay, ingest, trainer, SFT. `alignd up` runs them together."""

import logging
import os
from typing import Annotated

import typer
from rich.console import Console

from deploy.cli.process import fail, start, stop_on_signal, store_in_words, use_recipe
from deploy.config import AligndConfig, ConfigError, load_config
from deploy.endings import GAVE_UP_CODE, PASSING_CODE

Recipe = Annotated[
    str, typer.Option(help="Values of `training`: a recipe's name, such as smollm2, or the path of a .toml file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration, and do nothing.")]

logger = logging.getLogger(__name__)


def serve(dry_run: DryRun = False) -> None:
    """Run the gRPC server with its engine."""
    config = start(dry_run, "serve")
    if config:
        import asyncio
        from functools import partial

        from deploy.importing.first import is_wanted
        from feedback.outbox.door import OutboxError
        from serving.bootstrap import NoPolicyError
        from serving.listening import ListenError
        from serving.server import Places, serve
        from serving.vllm_engine import EngineError

        places = Places(
            config.bus_url, config.outbox_path, config.keyring_path, config.policies_dir, config.api_keys_path
        )

        def run() -> None:
            asyncio.run(serve(config.serving, config.feedback, places, is_wanted=partial(is_wanted, config)))

        try:
            # Where there is a version, the bus is not asked first: feedback is taken without it.
            if not (config.policies_dir / "v1").exists():
                import_first(config)
            prepare_operator_key(config)
            try:
                run()
            except NoPolicyError:
                # The bus is back, or has been found empty beside a version 1 that was made from another model.
                if not import_first(config):
                    raise
                run()
        except NoPolicyError as error:
            # Another start would end as this one did.
            raise fail(str(error), GAVE_UP_CODE) from error
        except ListenError as error:
            raise fail(str(error)) from error
        except OutboxError as error:
            raise fail(str(error), PASSING_CODE) from error
        except EngineError as error:
            # In the form by which `alignd up` finds the cause in the log, unless vLLM has said it before.
            raise fail(f"EngineError: {error}", GAVE_UP_CODE) from error


def gateway(dry_run: DryRun = False) -> None:
    """Serve HTTP for the gRPC server: OpenAI's API, and feedback."""
    config = start(dry_run, "gateway")
    if config:
        from policies.server_connection import ServerConnectionError
        from serving.access.certificates import CertificateError
        from serving.gateway.run import run_gateway

        try:
            run_gateway(config.gateway, config.server)
        except (CertificateError, ServerConnectionError) as error:
            raise fail(str(error)) from error


def relay(dry_run: DryRun = False) -> None:
    """Carry events from the outbox to the bus."""
    config = start(dry_run, "relay")
    if config:
        from feedback.outbox.relay import run_relay

        run_relay(config.outbox_path, config.bus_url, stop_on_signal(), config.feedback)


def ingest(
    dry_run: DryRun = False,
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="Read the whole log again first. Nothing is stored twice.")
    ] = False,
) -> None:
    """Carry events from the bus to the store."""
    config = start(dry_run, "ingest")
    if config:
        from feedback.store.ingest import run_ingest

        run_ingest(
            config.bus_url,
            config.store_url,
            config.keyring_path,
            stop_on_signal(),
            config.feedback,
            from_beginning=from_beginning,
        )


def train(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and the plan of a run, and do nothing.")
    ] = False,
    recipe: Recipe = "",
) -> None:
    """Train on new rankings, and register each new policy. `alignd runs` operates it."""
    use_recipe(recipe)
    config = start(dry_run, "train")
    if config:
        from deploy.capacity import fitted_settings
        from deploy.up import run_in_ranks
        from policies.artifact import ArtifactError
        from training.loop import run_trainer

        os.environ.update(fitted_settings(config, ["train"]))
        config = load_config()
        run_in_ranks("train", config.training.num_processes)
        try:
            with store_in_words():
                run_trainer(
                    config.training,
                    store_url=config.store_url,
                    policies_dir=config.policies_dir,
                    runs_dir=config.runs_dir,
                    server=config.server,
                )
        except ArtifactError as error:
            raise fail(str(error)) from error
    else:
        from deploy.cli.train_plan import print_plan

        # On standard error, so that standard output remains a configuration file.
        print_plan(load_config(), console=Console(stderr=True, highlight=False))


def sft(dry_run: DryRun = False) -> None:
    """Fine-tune on demonstrations, and register the result: promoted, it is the new reference policy."""
    config = start(dry_run)
    if config:
        from deploy.capacity import fitted_settings
        from policies.artifact import ArtifactError
        from training.errors import TrainingError
        from training.loop import run_sft_once

        fitted_settings(config, ["sft"])
        try:
            with store_in_words():
                version = run_sft_once(
                    config.training,
                    store_url=config.store_url,
                    policies_dir=config.policies_dir,
                    runs_dir=config.runs_dir,
                    server=config.server,
                )
        except (TrainingError, ArtifactError) as error:
            raise fail(str(error)) from error
        typer.echo(f"v{version} is registered. `alignd policies promote {version}` makes it live, and the reference.")


def prepare_operator_key(config: AligndConfig) -> None:
    """Makes the key of this machine's own processes, if there is none.

    Raises:
        ConfigError: the file of keys cannot be used.
    """
    from deploy.operator_key import make_operator_key
    from serving.access.keys import KeysError

    try:
        make_operator_key(config)
    except (KeysError, OSError) as error:
        raise ConfigError(f"the keys of this machine: {error}") from error


def import_first(config: AligndConfig) -> bool:
    """Makes serving.initial_model the first policy, if the bus answers and there is none. Returns whether it did.

    Raises:
        ConfigError: the model cannot be served or trained.
    """
    from deploy.importing.first import import_configured
    from feedback.bus.contract import BusError

    try:
        return import_configured(config)
    except BusError as error:
        logger.warning("the bus does not answer, so whether there is a policy to serve is not known yet: %s", error)
        return False
