"""Makes a working trainer pause or end a run when operators ask for it, and stop when it has lost its lease."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from sqlalchemy import Engine

from feedback import heartbeat
from training.config import TrainingConfig
from training.errors import RunAbortedError
from training.runs.lease import TrainerLease, read_control

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OperatorControl:
    """Where the trainer looks up what operators ask, and whether it still has the lease."""

    config: TrainingConfig
    engine: Engine
    lease: TrainerLease

    def between_rounds(self, run_id: str) -> None:
        """Renews the lease, and waits while the trainer is paused.

        Raises:
            RunAbortedError: an operator asked for this run to end.
            SystemExit: another trainer has taken over.
        """
        reported = False
        while True:
            heartbeat.beat()
            if not self.lease.renew():
                logger.error("another trainer has taken over; ending")
                sys.exit(1)
            control = read_control(self.engine)
            if run_id and control.abort_run == run_id:
                raise RunAbortedError("an operator asked for it to end")
            if not control.paused:
                return
            if not reported:
                logger.info("paused; `alignd runs resume` ends the pause")
            reported = True
            heartbeat.wait(self.config.poll_seconds)
