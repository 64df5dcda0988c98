"""`alignd`: starts every process of the loop and operates what runs. Each verb is one process or one question."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from deploy.cli import policies, runs
from deploy.client import CallError
from deploy.config import AligndConfig, ConfigError, load_config, resolved
from deploy.endings import PASSING_CODE
from deploy.models import ModelError

app = typer.Typer(
    help="InstructGPT as a live service: sample, rank, learn, swap. Start with `alignd demo`, or `alignd up`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(policies.app, name="policies")
app.add_typer(runs.app, name="runs")

Recipe = Annotated[
    str, typer.Option(help="Values of `training`: a recipe's name, such as smollm2, or the path of a .toml file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration, and do nothing.")]

_EXIT_CONFIG = 2
EXIT_FAILED = 1


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
    """Run everything on this machine: server, relay, ingest and trainer."""
    from deploy.up import VERBS, Service, ServiceError, Supervisor, child_environment

    unknown = sorted(set(without) - set(VERBS))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: takes one of {', '.join(VERBS)}", param_hint="--without")
    _use_recipe(recipe)
    if model:
        from deploy.own_model import use_model

        use_model(model, dry_run)
    config = _start(dry_run)
    if config:
        services = [Service(verb) for verb in VERBS if verb not in without]
        try:
            Supervisor(config.data_dir, child_environment(config), services).run()
        except ServiceError as error:
            raise _fail(str(error)) from error


@app.command()
def serve(dry_run: DryRun = False) -> None:
    """Run the gRPC server with its engine."""
    config = _start(dry_run)
    if config:
        import asyncio

        from feedback.bus.contract import BusError
        from feedback.outbox.door import OutboxError
        from serving.bootstrap import NoPolicyError
        from serving.server import Places, serve

        places = Places(config.bus_url, config.outbox_path, config.keyring_path, config.policies_dir)
        try:
            asyncio.run(serve(config.serving, config.feedback, places))
        except NoPolicyError as error:
            raise _fail(str(error)) from error
        except (BusError, OutboxError) as error:
            raise _fail(str(error), PASSING_CODE) from error


@app.command()
def relay(dry_run: DryRun = False) -> None:
    """Carry events from the outbox to the bus."""
    config = _start(dry_run)
    if config:
        from feedback.outbox.relay import run_relay

        run_relay(config.outbox_path, config.bus_url, _stop_on_signal(), config.feedback)


@app.command()
def ingest(dry_run: DryRun = False) -> None:
    """Carry events from the bus to the store."""
    config = _start(dry_run)
    if config:
        from feedback.store.ingest import run_ingest

        run_ingest(config.bus_url, config.store_url, _stop_on_signal(), config.feedback)


@app.command()
def train(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and the plan of a run, and do nothing.")
    ] = False,
    recipe: Recipe = "",
) -> None:
    """Train on new rankings, and register each new policy. `alignd runs` operates it."""
    _use_recipe(recipe)
    config = _start(dry_run)
    if config:
        from sqlalchemy.exc import OperationalError

        from deploy.up import run_in_ranks
        from policies.artifact import ArtifactError
        from training.loop import run_trainer

        run_in_ranks("train", config.training.num_processes)
        try:
            run_trainer(
                config.training,
                store_url=config.store_url,
                policies_dir=config.policies_dir,
                runs_dir=config.runs_dir,
                serving_address=config.server_address,
            )
        except OperationalError as error:
            raise _fail(f"the store is away: {error.orig}", PASSING_CODE) from error
        except ArtifactError as error:
            raise _fail(str(error)) from error
    else:
        from deploy.cli.train_plan import print_plan

        # On standard error, so that standard output remains a configuration file.
        print_plan(load_config(), console=Console(stderr=True, highlight=False))


@app.command()
def sft(dry_run: DryRun = False) -> None:
    """Fine-tune on demonstrations, and register the result: promoted, it is the new reference policy."""
    config = _start(dry_run)
    if config:
        from policies.artifact import ArtifactError
        from training.errors import TrainingError
        from training.loop import run_sft_once

        try:
            version = run_sft_once(
                config.training,
                store_url=config.store_url,
                policies_dir=config.policies_dir,
                runs_dir=config.runs_dir,
                serving_address=config.server_address,
            )
        except (TrainingError, ArtifactError) as error:
            raise _fail(str(error)) from error
        typer.echo(f"v{version} is registered. `alignd policies promote {version}` makes it live, and the reference.")


def _use_recipe(name_or_path: str) -> None:
    """Makes this process and its children use a recipe, if one is named.

    Raises:
        ConfigError: there is no such recipe, or it is bad.
    """
    from training.recipes import RecipeError, load_recipe

    if not name_or_path:
        return
    try:
        # A setting that the recipe does not name stays as alignd.toml has it.
        os.environ["ALIGND_TRAINING"] = load_recipe(name_or_path).model_dump_json(exclude_unset=True)
    except RecipeError as error:
        raise ConfigError(f"recipe {name_or_path}: {error}") from error


def _fail(message: str, code: int = EXIT_FAILED) -> typer.Exit:
    """Prints an error that operators can fix, and returns the exception that ends the command."""
    Console(stderr=True).print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(code)


@app.command()
def status() -> None:
    """Show which processes run, which policy is live, and how far training is."""
    from deploy.cli.status import print_status

    if not print_status(load_config()):
        raise typer.Exit(EXIT_FAILED)


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
    config = _start(dry_run)
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


def _start(dry_run: bool) -> AligndConfig | None:
    """Returns the configuration and begins to log; on a dry run, prints the configuration and returns None."""
    config = load_config()
    if dry_run:
        typer.echo(resolved(config), nl=False)
        return None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config.data_dir.mkdir(parents=True, exist_ok=True)
    return config


def _stop_on_signal() -> threading.Event:
    """Returns an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.set())
    return stop


def main(run: Callable[[], None] = app) -> None:
    """Runs the command line. An error that operators can fix ends it with a message and an exit code."""
    try:
        run()
    except ConfigError as error:
        Console(stderr=True).print(f"[red]configuration[/]\n{escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(_EXIT_CONFIG)
    except (CallError, ModelError) as error:
        Console(stderr=True).print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)
