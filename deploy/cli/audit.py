"""`alignd audit`: who did what and when, from the policies' history and the file of keys."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import typer
from rich.console import Console

from alignd.v1 import policy_service_pb2 as pb
from deploy.cli.plain import plain
from deploy.cli.process import fail
from deploy.client import TIMEOUT_SECONDS, CallError, connect
from deploy.config import AligndConfig
from serving.access.keys import KeysError, read_keys

_PAGE_SIZE = 100


@dataclass(frozen=True)
class Deed:
    """One thing that somebody did."""

    time: str
    """ISO 8601, in UTC."""
    who: str
    """The name of a key, a server, or, of what is done to keys, a user of this machine."""
    claimed: str
    """Who a caller by a key said to be."""
    what: str
    why: str


def print_audit(config: AligndConfig, *, as_json: bool) -> None:
    """Prints all deeds, the oldest first; where one part cannot be read, those of the other, and fails."""
    deeds: list[Deed] = []
    failed: list[str] = []
    for read in (_of_policies, _of_keys):
        try:
            deeds += read(config)
        except (CallError, KeysError, OSError) as error:
            failed.append(str(error))
    deeds.sort(key=lambda deed: deed.time)
    console = Console(highlight=False)
    for deed in deeds:
        if as_json:
            typer.echo(json.dumps(asdict(deed)))
            continue
        who = f"{deed.who} ({deed.claimed})" if deed.claimed else deed.who
        said = f"{deed.time}  {who}: {deed.what}" + (f": {deed.why}" if deed.why else "")
        console.print(plain(said), markup=False, soft_wrap=True)
    if failed:
        raise fail("this is not all: " + "; ".join(failed))


def _of_policies(config: AligndConfig) -> list[Deed]:
    deeds: list[Deed] = []
    with connect(config.server) as operator:
        page_token = ""
        while True:
            request = pb.ListPoliciesRequest(page_size=_PAGE_SIZE, page_token=page_token)
            page = operator.policies.ListPolicies(request, timeout=TIMEOUT_SECONDS)
            for policy in page.policies:
                deeds += [_of_change(change) for change in policy.history]
            page_token = page.next_page_token
            if not page_token:
                return deeds


def _of_change(change: pb.StageChange) -> Deed:
    before, after = (pb.Stage.Name(each).removeprefix("STAGE_") for each in (change.from_stage, change.to_stage))
    what = f"v{change.version} registered" if before == "UNSPECIFIED" else f"v{change.version} {before} -> {after}"
    when = change.change_time.ToDatetime(tzinfo=UTC)
    return Deed(_iso(when), change.actor, change.claimed_actor, what, change.reason)


def _of_keys(config: AligndConfig) -> list[Deed]:
    deeds = []
    for key in read_keys(config.api_keys_path):
        what = f"key {key.name} ({key.key_id}) of {key.application or 'no application'}"
        made = f"made in place of {key.replaces}" if key.replaces else "created"
        deeds.append(Deed(_iso(key.created_at), key.created_by, "", f"{what} {made}: {', '.join(key.scopes)}", ""))
        if key.revoked_at:
            deeds.append(Deed(_iso(key.revoked_at), key.revoked_by, "", f"{what} revoked", ""))
    return deeds


def _iso(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds")
