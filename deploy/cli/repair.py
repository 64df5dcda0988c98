"""Mends the policy log where the server cannot start: appends to the bus itself, and says what it does."""

import asyncio
from contextlib import closing

from deploy.client import CallError
from deploy.config import AligndConfig
from feedback.bus.contract import BusError
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from policies.repair import Repair, RepairError, plan_repair
from serving.errors import Refusal
from serving.policy_log import PolicyLog

_BUS_TIMEOUT_SECONDS = 60.0
_MOST_PASSED_OVER = 20


def repair_log(config: AligndConfig, live: int, actor: str, reason: str, *, dry_run: bool) -> list[str]:
    """Mends the log, and returns what was done, in words. On a dry run, what would be done.

    Args:
        config: where bus and versions are.
        live: the version that is to be live; 0 leaves it to the log.
        actor: who repairs it.
        reason: why.
        dry_run: whether to change nothing.

    Raises:
        CallError: it cannot be repaired; the message says why, and what to do.
    """
    try:
        with closing(open_bus(config.bus_url)) as bus:
            bus.create_topics(TOPICS)
            return asyncio.run(_repair(PolicyLog(bus), config, live, actor, reason, dry_run))
    except (BusError, TimeoutError) as error:
        raise CallError(f"the bus {config.bus_url} does not answer: {error or 'timed out'}") from error
    except (RepairError, Refusal, OSError) as error:
        raise CallError(str(error)) from error


async def _repair(
    policies: PolicyLog, config: AligndConfig, live: int, actor: str, reason: str, dry_run: bool
) -> list[str]:
    await asyncio.wait_for(policies.start(), _BUS_TIMEOUT_SECONDS)
    try:
        passed_over = policies.passed_over[-_MOST_PASSED_OVER:]
        said = [f"passed over by every replica: {each}" for each in passed_over]
        repair: Repair = await asyncio.to_thread(plan_repair, policies.state, config.policies_dir, live, actor, reason)
        for event in () if dry_run else repair.events:
            outcome = await policies.propose(event)
            if outcome.refusal:
                raise RepairError(f"somebody else changed the log meanwhile ({outcome.refusal}); run it again")
        return [*said, *repair.said]
    finally:
        await policies.stop()
