"""`alignd`: starts every process of the loop and operates what runs. Each verb is one process or one question."""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from deploy.apart import DiedError
from deploy.cli import keys, policies, processes, runs
from deploy.cli.plain import plain
from deploy.cli.process import EXIT_FAILED, fail, start, use_recipe
from deploy.cli.processes import DryRun, Recipe, import_first, prepare_operator_key
from deploy.client import CallError
from deploy.config import ConfigError, load_config, resolved
from deploy.data_dir import only_up
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
                import_first(config)
            prepare_operator_key(config)
            update_store(config)
            try:
                Supervisor(config.data_dir, environment, [Service(verb) for verb in verbs]).run()
            except ServiceError as error:
                raise fail(str(error)) from error


for verb in (processes.serve, processes.gateway, processes.relay, processes.ingest, processes.train, processes.sft):
    app.command()(verb)


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
