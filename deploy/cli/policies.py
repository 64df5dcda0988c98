"""`alignd policies`: what operators do with policy versions."""

import getpass
import json
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from alignd.v1 import policy_service_pb2 as pb
from alignd.v1.policy_manifest_pb2 import PolicyManifest
from deploy.client import TIMEOUT_SECONDS, Operator, connect
from deploy.config import load_config

app = typer.Typer(help="List, show, promote and roll back policy versions.", no_args_is_help=True)
console = Console()

Version = Annotated[str, typer.Argument(help="A version such as v7, or `live`.")]
Reason = Annotated[str, typer.Option("--reason", "-m", help="Why; kept in the version's history.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@app.command("list")
def list_policies(as_json: Json = False) -> None:
    """List the versions, newest first, and what each replica serves."""
    with connect(load_config().server_address) as operator:
        policies, response = all_policies(operator)
    if as_json:
        found = pb.ListPoliciesResponse(policies=policies, replicas=response.replicas)
        found.live_version = response.live_version
        print_json(found)
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
            ", ".join(served) or "-",
        )
    console.print(table)


@app.command()
def show(version: Version, as_json: Json = False) -> None:
    """Show one version: its standing, its history, what it scored."""
    with connect(load_config().server_address) as operator:
        policy = get(operator, version)
    if as_json:
        print_json(policy)
        return
    console.print(f"[bold]v{policy.version}[/] {pb.Stage.Name(policy.stage).removeprefix('STAGE_')}")
    console.print(f"files    {policy.artifact_uri}", soft_wrap=True, markup=False)
    console.print(f"weights  {policy.manifest.weight_digest}")
    for change in policy.history:
        console.print(
            f"  {change.change_time.ToDatetime().isoformat(' ', 'seconds')}  "
            f"{pb.Stage.Name(change.to_stage).removeprefix('STAGE_'):<10}{change.actor}: {change.reason}",
            soft_wrap=True,
            markup=False,
        )
    for each in policy.manifest.evaluations:
        interval = f" [{each.low:.3f}, {each.high:.3f}]" if each.HasField("low") else ""
        console.print(f"  {each.name} {each.value:.3f}{interval}, n = {each.count}", highlight=False, markup=False)


@app.command()
def promote(version: Version, reason: Reason = "", dry_run: DryRun = False) -> None:
    """Make a candidate live; the version that was live is retired."""
    with connect(load_config().server_address) as operator:
        policy = get(operator, version)
        if announced(f"v{policy.version} would become LIVE", dry_run):
            return
        request = pb.PromoteRequest(version=policy.version, actor=actor(), reason=reason)
        operator.policies.Promote(request, timeout=TIMEOUT_SECONDS)
    console.print(f"v{policy.version} is live. Replicas swap now: `alignd policies list` shows what each serves.")


@app.command()
def rollback(
    version: Annotated[str, typer.Argument(help="A retired version; default: the one live before.")] = "",
    reason: Reason = "",
    dry_run: DryRun = False,
) -> None:
    """Make a retired version live again."""
    with connect(load_config().server_address) as operator:
        target = get(operator, version).version if version else 0
        if announced(f"{f'v{target}' if target else 'the version live before'} would become LIVE", dry_run):
            return
        request = pb.RollbackRequest(
            version=target, actor=actor(), reason=reason, expected_live_version=get(operator, "live").version
        )
        policy = operator.policies.Rollback(request, timeout=TIMEOUT_SECONDS).policy
    console.print(f"v{policy.version} is live again. Replicas swap now: `alignd policies list` shows what each serves.")


@app.command()
def lineage(version: Version = "live", as_json: Json = False) -> None:
    """Show where a version comes from, back to the first."""
    with connect(load_config().server_address) as operator:
        chain = [get(operator, version)]
        while chain[-1].manifest.parent_version:
            chain.append(get(operator, f"v{chain[-1].manifest.parent_version}"))
    if as_json:
        typer.echo(json.dumps([MessageToDict(policy, preserving_proto_field_name=True) for policy in chain], indent=2))
        return
    console.print(lineage_tree([policy.manifest for policy in chain]))


def lineage_tree(manifests: list[PolicyManifest]) -> Tree:
    """Returns a picture of the versions, each under the one it became."""
    root = branch = Tree("lineage")
    for manifest in manifests:
        made = manifest.create_time.ToDatetime().isoformat(" ", "seconds")
        branch = branch.add(f"[bold]v{manifest.version}[/]  weights {manifest.weight_digest[:12]}  made {made}")
        if not manifest.HasField("training"):
            branch.add("imported")
            continue
        training = manifest.training
        branch.add(f"{training.algorithm}, seed {training.seed}, run {training.run_id}")
        branch.add(f"KL from v{manifest.reference_version}; reward model {training.reward_model_digest[:12]}")
        rankings = branch.add(f"{training.num_rankings} rankings")
        for each in training.rankings:
            rankings.add(f"{each.topic}/{each.partition}: offsets {each.first_offset} to {each.last_offset}")
        branch.add(f"{training.num_prompts} prompts, digest {training.prompts_digest[:12]}")
    return root


def all_policies(operator: Operator) -> tuple[list[Any], Any]:
    """Returns every version, newest first, and the last page."""
    policies: list[Any] = []
    response = pb.ListPoliciesResponse(next_page_token="")
    while True:
        request = pb.ListPoliciesRequest(page_token=response.next_page_token)
        response = operator.policies.ListPolicies(request, timeout=TIMEOUT_SECONDS)
        policies += response.policies
        if not response.next_page_token:
            return policies, response


def get(operator: Operator, version: str) -> Any:
    """Returns one version."""
    name = f"v{version}" if version.isdigit() else version
    return operator.policies.GetPolicy(pb.GetPolicyRequest(policy=name), timeout=TIMEOUT_SECONDS).policy


def announced(what: str, dry_run: bool) -> bool:
    """Says what would be done, if nothing is to be."""
    if dry_run:
        console.print(f"Dry run: {what}.")
    return dry_run


def actor() -> str:
    """Returns who is at the keyboard."""
    return f"operator/{getpass.getuser()}"


def print_json(message: Any) -> None:
    typer.echo(json.dumps(MessageToDict(message, preserving_proto_field_name=True), indent=2))
