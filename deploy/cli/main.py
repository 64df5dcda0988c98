"""`alignd`: starts every process of the loop and operates what runs. Each verb is one process or one question."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from deploy.apart import DiedError
from deploy.cli import keys, policies, runs
from deploy.cli.plain import plain
from deploy.cli.process import EXIT_FAILED, fail, start, stop_on_signal, store_in_words, use_recipe
from deploy.client import CallError
from deploy.config import AligndConfig, ConfigError, load_config, resolved
from deploy.data_dir import only_up
from deploy.endings import GAVE_UP_CODE, PASSING_CODE
from deploy.models import ModelError
from policies.vllm_settings import MissingError

app = typer.Typer(
    help="InstructGPT as a live service: sample, rank, learn, swap. Start with `alignd demo`, or `alignd up`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app, name="keys")
app.add_typer(policies.app, name="policies")
app.add_typer(runs.app, name="runs")

Recipe = Annotated[
    str, typer.Option(help="Values of `training`: a recipe's name, such as smollm2, or the path of a .toml file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration, and do nothing.")]

logger = logging.getLogger(__name__)

_EXIT_CONFIG = 2


@app.command()
def up(
    without: Annotated[
        list[str], typer.Option(help="Leave this process out, such as train while `alignd sft` runs; may be repeated.")
    ] = [],  # noqa: B006 (typer wants a list, and makes a new one)
    model: Annotated[
        str,
        typer.Option(
            help="Begin with this model: a Hugging Face model folder, or a name on the hub (org/name[@revision])."
        ),
    ] = "",
    recipe: Recipe = "",
    dry_run: DryRun = False,
) -> None:
    """Run everything on this machine: server, gateway, relay, ingest and trainer."""
    from deploy.up import VERBS, Service, ServiceError, Supervisor, child_environment, update_store

    unknown = sorted(set(without) - set(VERBS))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: takes one of {', '.join(VERBS)}", param_hint="--without")
    use_recipe(recipe)
    if model:
        from deploy.own_model import use_model

        use_model(model, dry_run)
    config = start(dry_run)
    if config:
        from deploy.apart import apart
        from deploy.capacity import fitted_settings

        verbs = [verb for verb in VERBS if verb not in without]
        with only_up(config.data_dir):
            environment = child_environment(config) | apart(fitted_settings, config, verbs)
            if "serve" in verbs:
                _import_first(config)
            _make_operator_key(config)
            update_store(config)
            try:
                Supervisor(config.data_dir, environment, [Service(verb) for verb in verbs]).run()
            except ServiceError as error:
                raise fail(str(error)) from error


@app.command()
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
                _import_first(config)
            _make_operator_key(config)
            try:
                run()
            except NoPolicyError:
                # The bus is back, or has been found empty beside a version 1 that was made from another model.
                if not _import_first(config):
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


@app.command()
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


@app.command()
def relay(dry_run: DryRun = False) -> None:
    """Carry events from the outbox to the bus."""
    config = start(dry_run, "relay")
    if config:
        from feedback.outbox.relay import run_relay

        run_relay(config.outbox_path, config.bus_url, stop_on_signal(), config.feedback)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def status() -> None:
    """Show which processes run, which policy is live, and how far training is."""
    from deploy.cli.status import print_status

    if not print_status(load_config()):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def audit(as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False) -> None:
    """List who did what, when: changes of policies and of keys, the oldest first."""
    from deploy.cli.audit import print_audit

    print_audit(load_config(), as_json=as_json)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="The same path on a tiny random model.")] = False,
    began_at: Annotated[float, typer.Option(hidden=True, help="Unix time at which set-up began.")] = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Run the whole loop: simulated users rank, a policy is trained, serving swaps. Ends with a report."""
    from deploy.demo.progress import only_ours
    from deploy.demo.run import make_model, run_demo, set_up
    from deploy.simulation.config import load_simulation
    from deploy.up import child_environment

    root = load_config().data_dir
    set_up(quick, load_config())
    os.environ.update(child_environment(load_config()))
    simulated = load_simulation()
    config = start(dry_run)
    if config is None:
        typer.echo(resolved(simulated), nl=False)
        return
    with only_ours(config.data_dir / "logs" / "demo.log"):
        passed = run_demo(config, simulated.simulation, make_model(quick, root), began_at or None)
    if not passed:
        raise typer.Exit(EXIT_FAILED)


@app.command("config")
def show_config() -> None:
    """Print the resolved configuration, with a description of each field."""
    typer.echo(resolved(load_config()), nl=False)


def _make_operator_key(config: AligndConfig) -> None:
    from deploy.operator_key import make_operator_key
    from serving.access.keys import KeysError

    try:
        make_operator_key(config)
    except (KeysError, OSError) as error:
        raise ConfigError(f"the keys of this machine: {error}") from error


def _import_first(config: AligndConfig) -> bool:
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


def main(run: Callable[[], None] = app) -> None:
    """Runs the command line. An error that operators can fix ends it with a message and an exit code."""
    try:
        run()
    except ConfigError as error:
        Console(stderr=True).print(
            f"[red]configuration[/]\n{escape(plain(error, lines=True))}", highlight=False, soft_wrap=True
        )
        sys.exit(_EXIT_CONFIG)
    except MissingError as error:
        sys.exit(fail(str(error), _EXIT_CONFIG).exit_code)
    except (CallError, DiedError, ModelError) as error:
        Console(stderr=True).print(plain(error, lines=True), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)
