"""`alignd policies`: what operators do with policy versions."""

import getpass
import json
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from alignd.v1 import policy_service_pb2 as pb
from alignd.v1.policy_manifest_pb2 import PolicyManifest
from deploy.cli.plain import plain
from deploy.client import TIMEOUT_SECONDS, Operator, connect
from deploy.config import load_config

app = typer.Typer(help="Import, list, show, promote, roll back and repair policy versions.", no_args_is_help=True)
console = Console()

Version = Annotated[str, typer.Argument(help="A version such as v7, or `live`.")]
Reason = Annotated[str, typer.Option("--reason", "-m", help="Why; kept in the version's history.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@app.command("list")
def list_policies(as_json: Json = False) -> None:
    """List the versions, newest first, and what each replica serves."""
    with connect(load_config().server) as operator:
        policies, response = _all_policies(operator)
    if as_json:
        found = pb.ListPoliciesResponse(policies=policies, replicas=response.replicas)
        found.live_version = response.live_version
        _print_json(found)
        return
    table = Table("version", "stage", "parent", "rankings", "made", "weights", "served by")
    for policy in policies:
        served = [each.replica_id for each in response.replicas if each.policy.version == policy.version]
        table.add_row(
            f"v{policy.version}",
            pb.Stage.Name(policy.stage).removeprefix("STAGE_"),
            f"v{policy.manifest.parent_version}" if policy.manifest.parent_version else "-",
            str(policy.manifest.training.num_rankings or "-"),
            policy.manifest.create_time.ToDatetime().isoformat(" ", "seconds"),
            policy.manifest.weight_digest[:12],
            _shown(", ".join(served)) or "-",
        )
    console.print(table)
    for each in response.replicas:
        if each.state == pb.REPLICA_STATE_DEGRADED:
            console.print(_shown(f"{each.replica_id} is DEGRADED: {each.error_message}"), soft_wrap=True)


@app.command("import")
def import_model(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face model folder, or a name on the hub (org/name[@revision]).")
    ],
) -> None:
    """Make a model the first version: convert its weights, and try it in vLLM and in training. Starts nothing."""
    from deploy.own_model import import_named

    import_named(model)


@app.command()
def show(version: Version, as_json: Json = False) -> None:
    """Show one version: its stage, its history and its evaluations."""
    with connect(load_config().server) as operator:
        policy = _get(operator, version)
    if as_json:
        _print_json(policy)
        return
    console.print(f"[bold]v{policy.version}[/] {pb.Stage.Name(policy.stage).removeprefix('STAGE_')}")
    console.print(f"files    {plain(policy.artifact_uri)}", soft_wrap=True, markup=False)
    console.print(f"weights  {policy.manifest.weight_digest}")
    for change in policy.history:
        console.print(
            f"  {change.change_time.ToDatetime().isoformat(' ', 'seconds')}  "
            f"{pb.Stage.Name(change.to_stage).removeprefix('STAGE_'):<10}{plain(_who(change))}: {plain(change.reason)}",
            soft_wrap=True,
            markup=False,
        )
    for each in policy.manifest.evaluations:
        interval = f" [{each.low:.3f}, {each.high:.3f}]" if each.HasField("low") else ""
        console.print(
            f"  {plain(each.name)} {each.value:.3f}{interval}, n = {each.count}", highlight=False, markup=False
        )


@app.command()
def promote(version: Version, reason: Reason = "", dry_run: DryRun = False) -> None:
    """Make a candidate live; the version that was live is retired."""
    with connect(load_config().server) as operator:
        policy = _get(operator, version)
        if _announce(f"v{policy.version} would become LIVE", dry_run):
            return
        request = pb.PromoteRequest(version=policy.version, actor=_actor(), reason=reason)
        operator.policies.Promote(request, timeout=TIMEOUT_SECONDS)
    console.print(f"v{policy.version} is live. Replicas swap now: `alignd policies list` shows what each serves.")


@app.command()
def rollback(
    version: Annotated[str, typer.Argument(help="A retired version. Default: the version that was live before.")] = "",
    reason: Reason = "",
    dry_run: DryRun = False,
) -> None:
    """Make a retired version live again."""
    with connect(load_config().server) as operator:
        target = _get(operator, version).version if version else 0
        if _announce(f"{f'v{target}' if target else 'the version that was live before'} would become LIVE", dry_run):
            return
        request = pb.RollbackRequest(
            version=target, actor=_actor(), reason=reason, expected_live_version=_get(operator, "live").version
        )
        policy = operator.policies.Rollback(request, timeout=TIMEOUT_SECONDS).policy
    console.print(f"v{policy.version} is live again. Replicas swap now: `alignd policies list` shows what each serves.")


NeededReason = Annotated[str, typer.Option("--reason", "-m", help="Why; kept in the version's history. Required.")]


@app.command()
def reject(version: Version, reason: NeededReason, dry_run: DryRun = False) -> None:
    """Reject a version on all replicas. If it is live, the one that was live before it is again."""
    with connect(load_config().server) as operator:
        policy = _get(operator, version)
        if _announce(f"v{policy.version} would become REJECTED", dry_run):
            return
        request = pb.RejectRequest(version=policy.version, actor=_actor(), reason=reason)
        operator.policies.Reject(request, timeout=TIMEOUT_SECONDS)
    console.print(f"v{policy.version} is REJECTED. `alignd policies reinstate` takes that back.")


@app.command()
def reinstate(version: Version, reason: NeededReason, dry_run: DryRun = False) -> None:
    """Take back the rejection of a version, if it was a mistake. This does not make it live."""
    with connect(load_config().server) as operator:
        policy = _get(operator, version)
        if _announce(f"v{policy.version} would no longer be REJECTED", dry_run):
            return
        request = pb.ReinstateRequest(version=policy.version, actor=_actor(), reason=reason)
        policy = operator.policies.Reinstate(request, timeout=TIMEOUT_SECONDS).policy
    stage = pb.Stage.Name(policy.stage).removeprefix("STAGE_")
    verb = "rollback" if policy.stage == pb.STAGE_RETIRED else "promote"
    console.print(f"v{policy.version} is {stage}. `alignd policies {verb} v{policy.version}` makes it live.")


@app.command()
def repair(
    live: Annotated[str, typer.Option(help="The version that is to be live. Default: by the log.")] = "",
    reason: Reason = "repaired by an operator",
    dry_run: DryRun = False,
) -> None:
    """Mend the policy log where no server can start: it was lost, or nothing in it that is live can be served.

    Needs no server: it reads the versions' folders and the bus, and appends to the bus what is missing.
    """
    from deploy.cli.repair import repair_log

    version = live.removeprefix("v")
    if live and not (version.isascii() and version.isdigit() and int(version)):
        raise typer.BadParameter(f"{live!r} is no version; give one such as v7", param_hint="--live")
    said = repair_log(load_config(), int(version or 0), _actor(), reason, dry_run=dry_run)
    for each in said:
        console.print(f"{'Dry run: ' if dry_run else ''}{plain(each)}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def lineage(version: Version = "live", as_json: Json = False) -> None:
    """Show what a version was trained from, back to the first version."""
    with connect(load_config().server) as operator:
        chain = [_get(operator, version)]
        known = {policy.version: policy for policy in _all_policies(operator)[0]}
        # After a repair, a version's parent may be one that was deleted.
        while chain[-1].manifest.parent_version in known:
            chain.append(known[chain[-1].manifest.parent_version])
    if as_json:
        typer.echo(json.dumps([MessageToDict(policy, preserving_proto_field_name=True) for policy in chain], indent=2))
        return
    console.print(_lineage_tree([policy.manifest for policy in chain]))


def _lineage_tree(manifests: list[PolicyManifest]) -> Tree:
    """Returns the versions as a tree, with the parent of each below it."""
    root = branch = Tree("lineage")
    for manifest in manifests:
        made = manifest.create_time.ToDatetime().isoformat(" ", "seconds")
        branch = branch.add(f"[bold]v{manifest.version}[/]  weights {manifest.weight_digest[:12]}  made {made}")
        if not manifest.HasField("training"):
            branch.add("imported")
            continue
        training = manifest.training
        branch.add(_shown(f"{training.algorithm}, seed {training.seed}, run {training.run_id}"))
        branch.add(_shown(f"KL from v{manifest.reference_version}; reward model {training.reward_model_digest[:12]}"))
        rankings = branch.add(f"{training.num_rankings} rankings")
        for each in training.rankings:
            place = f"{each.topic}/{each.partition}"
            rankings.add(_shown(f"{place}: offsets {each.first_offset} to {each.last_offset}"))
        branch.add(_shown(f"{training.num_prompts} prompts, digest {training.prompts_digest[:12]}"))
    return root


def _shown(text: str) -> str:
    """Returns what came from outside as rich prints it unchanged."""
    return escape(plain(text))


def _all_policies(operator: Operator) -> tuple[list[Any], Any]:
    """Returns all versions, newest first, and the last page of the server's response."""
    policies: list[Any] = []
    response = pb.ListPoliciesResponse(next_page_token="")
    while True:
        request = pb.ListPoliciesRequest(page_token=response.next_page_token)
        response = operator.policies.ListPolicies(request, timeout=TIMEOUT_SECONDS)
        policies += response.policies
        if not response.next_page_token:
            return policies, response


def _get(operator: Operator, version: str) -> Any:
    """Returns a policy by its version, such as 7, v7 or `live`."""
    name = f"v{version}" if version.isdigit() else version
    return operator.policies.GetPolicy(pb.GetPolicyRequest(policy=name), timeout=TIMEOUT_SECONDS).policy


def _announce(what: str, dry_run: bool) -> bool:
    """Prints what would be done, if this is a dry run; returns whether it is."""
    if dry_run:
        console.print(f"Dry run: {what}.")
    return dry_run


def _who(change: pb.StageChange) -> str:
    """Returns who made a change, and who that said to be."""
    return f"{change.actor} ({change.claimed_actor})" if change.claimed_actor else change.actor


def _actor() -> str:
    """Returns the name under which the history records what this user changes."""
    return f"operator/{getpass.getuser()}"


def _print_json(message: Any) -> None:
    typer.echo(json.dumps(MessageToDict(message, preserving_proto_field_name=True), indent=2))
