"""`alignd train --dry-run`: how much memory and time a training run would take, on one screen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from alignd.v1 import policy_service_pb2 as pb
from deploy.cli.plain import plain
from deploy.client import CallError, connect
from deploy.config import AligndConfig
from policies.artifact import ArtifactError
from policies.location import artifact_folder, version_folders
from policies.precision import short_name
from policies.server_connection import ServerConnection
from training.planning.hardware import GIB, Hardware, this_machine
from training.planning.memory import MOMENTS
from training.planning.model_size import CONFIG_FILE, UnknownModelError, read_model
from training.planning.phases import Phase
from training.planning.plan import Plan, make_plan

TIMEOUT_SECONDS = 5.0
_BAR_WIDTH = 24
# Parts below this share of the fullest moment are shown as one.
_SMALL_SHARE = 0.01
_INDENT = (0, 0, 0, 2)


@dataclass(frozen=True)
class FoundModel:
    """A model's folder, and how the plan names the model."""

    folder: Path
    what: str


def print_plan(
    config: AligndConfig,
    model_folder: Path | None = None,
    *,
    hardware: Hardware | None = None,
    console: Console | None = None,
) -> bool:
    """Prints the plan of a run by `config.training`, and returns whether there is a model to plan for.

    Args:
        config: its `training` is planned, which has the values of a recipe already.
        model_folder: a folder with the model's config.json. Default: that of the live policy, or of the model that
            would become the first policy.
        hardware: the speed and memory to plan for. Default: those of this machine, measured now in about a second.
        console: where to print. Default: standard output.
    """
    console = console or Console(highlight=False)
    found = FoundModel(model_folder, "the given model") if model_folder else find_model(config)
    if found is None:
        console.print(
            plain(
                f"There is no model to plan for: no server answers at {config.server_address}, there is no policy in "
                f"{config.policies_dir}, and serving.initial_model is not set. Set it to a model's folder."
            ),
            soft_wrap=True,
            markup=False,
        )
        return False
    try:
        model = read_model(found.folder)
    except UnknownModelError as error:
        console.print(plain(f"{found.what} cannot be planned for: {error}"), soft_wrap=True, markup=False)
        return False
    plan = make_plan(config.training, model, hardware or this_machine())
    console.print(Group(*_page(plan, found)))
    return True


def find_model(config: AligndConfig) -> FoundModel | None:
    """Returns the live policy if the server names it, else the newest version on disk, else the initial model.

    All versions have the shape of the model that the first was made of, so any of them will do.
    """
    candidates = [_live(config.server), _newest(config.policies_dir)]
    if config.serving.initial_model:
        candidates.append(FoundModel(config.serving.initial_model, "serving.initial_model, which becomes v1"))
    return next((each for each in candidates if each), None)


def _live(server: ServerConnection) -> FoundModel | None:
    try:
        with connect(server) as operator:
            policy = operator.policies.GetPolicy(pb.GetPolicyRequest(policy="live"), timeout=TIMEOUT_SECONDS).policy
        folder = artifact_folder(policy.artifact_uri)
    except (CallError, ArtifactError):
        return None
    return FoundModel(folder, f"v{policy.version}, which is live") if (folder / CONFIG_FILE).is_file() else None


def _newest(policies_dir: Path) -> FoundModel | None:
    folders = version_folders(policies_dir)
    newest = max((version for version, folder in folders.items() if (folder / CONFIG_FILE).is_file()), default=0)
    if not newest:
        return None
    return FoundModel(folders[newest], f"v{newest}, the newest on disk, since no server says which is live")


def _page(plan: Plan, found: FoundModel) -> list[RenderableType]:
    memory, hardware, peak = plan.memory, plan.hardware, plan.memory.peak / GIB
    each = " on each device" if hardware.num_devices > 1 else ""
    return [
        *_facts(plan, found),
        _heading("Parameters"),
        Padding(_parameters(plan), _INDENT, expand=False),
        _heading(f"Memory at its fullest ({memory.fullest}): {peak:.1f} of {hardware.memory_gib:.1f} GiB{each}"),
        Padding(_memory(plan), _INDENT, expand=False),
        _heading(f"Time: about {duration(plan.run_seconds)} for the run"),
        Padding(_times(plan), _INDENT, expand=False),
        *(Text(f"! {warning}", style="yellow") for warning in plan.warnings),
    ]


def _facts(plan: Plan, found: FoundModel) -> list[RenderableType]:
    work, hardware, ppo = plan.work, plan.hardware, plan.work.config.ppo
    several = hardware.num_devices > 1
    products = f"multiplies {short_name(hardware.computes_in)} at {hardware.matmul_gflop_s:,.0f} GFLOP/s"
    devices = f"{hardware.num_devices} × {hardware.name}, a process each" if several else hardware.name
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("model", f"{work.model.name}, {amount(work.model.total)} parameters: {escape(plain(found.what))}")
    table.add_row("", escape(plain(found.folder)))
    table.add_row(
        "machine",
        f"{escape(devices)}: reads {hardware.bandwidth_gb_s:,.0f} GB/s, {products}, "
        f"{hardware.memory_gib:.1f} GiB{' each' if several else ''}",
    )
    table.add_row(
        "round",
        f"{ppo.prompts_per_round} prompts × {ppo.rollouts_per_prompt} rollouts, "
        f"{ppo.num_epochs} × {ppo.num_minibatches} optimizer steps",
    )
    table.add_row(
        "assumed",
        f"prompts of {work.prompt_tokens:.0f} tokens (at most {ppo.max_prompt_tokens}), rollouts of "
        f"{work.completion_tokens:.0f} (at most {ppo.max_tokens})",
    )
    reached = hardware.efficiency
    table.add_row("", f"{reached.decode:.0%} of the roof reached in decoding, {reached.update:.0%} in updates")
    return [table]


def _parameters(plan: Plan) -> Table:
    table = _table("", "trained", "frozen")
    for part in plan.parameters:
        table.add_row(part.name, amount(part.trained), amount(part.frozen))
    totals = (sum(part.trained for part in plan.parameters), sum(part.frozen for part in plan.parameters))
    table.add_row("all", *map(amount, totals), style="bold")
    return table


def _memory(plan: Plan) -> RenderableType:
    memory = plan.memory
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    peak, small = memory.peak, 0.0
    for part in memory.at(memory.fullest):
        if part.bytes < _SMALL_SHARE * peak:
            small += part.bytes
        else:
            table.add_row(part.name, size(part.bytes), bar(part.bytes / peak))
    if small:
        table.add_row("all else", size(small), bar(small / peak))
    moments = ", ".join(f"{moment} {size(memory.total(moment))}" for moment in MOMENTS)
    return Group(table, Text(f"at each moment: {moments}"))


def _times(plan: Plan) -> Table:
    table = _table("", "tokens", "TFLOP", "time", "share")
    rounds = plan.num_rounds
    for phase in plan.round:
        _add_phase(table, plan, phase, phase.name, rounds)
    table.add_row("one round", "", "", duration(plan.round_seconds), "", end_section=True)
    for phase in plan.once:
        _add_phase(table, plan, phase, f"{phase.name}, once", 1)
    total = f"the run, {rounds} rounds"
    table.add_row(total, "", f"{plan.run_flops / 1e12:,.2f}", duration(plan.run_seconds), "", style="bold")
    return table


def _add_phase(table: Table, plan: Plan, phase: Phase, name: str, times: int) -> None:
    share = times * phase.seconds / plan.run_seconds
    table.add_row(name, amount(phase.tokens), f"{phase.flops / 1e12:,.2f}", duration(phase.seconds), f"{share:.0%}")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def bar(share: float) -> str:
    """Returns a bar that is full for a share of 1."""
    return "█" * max(1, round(_BAR_WIDTH * share))


def size(num_bytes: float) -> str:
    """Returns a number of bytes in MiB or GiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def amount(count: float) -> str:
    """Returns a count in thousands, millions or billions."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return f"{count:.0f}" if count else "-"


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it, from milliseconds to days."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
