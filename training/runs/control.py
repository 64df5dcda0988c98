"""What operators ask of a trainer while it works: to pause, to end a run; and whether it may work at all."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

from sqlalchemy import Engine

from training.config import TrainingConfig
from training.errors import RunAbortedError
from training.runs.lease import TrainerLease, read_control

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OperatorControl:
    """What operators ask of the trainer, and whether this trainer still holds the lease."""

    config: TrainingConfig
    engine: Engine
    lease: TrainerLease

    def between_rounds(self, run_id: str) -> None:
        """Waits while the trainer is paused. Raises RunAbortedError, or SystemExit if another trainer took over."""
        reported = False
        while True:
            if not self.lease.renew():
                logger.error("another trainer has taken over; ending")
                sys.exit(1)
            control = read_control(self.engine)
            if run_id and control.abort_run == run_id:
                raise RunAbortedError("an operator asked for it to end")
            if not control.paused:
                return
            if not reported:
                logger.info("paused; `alignd runs resume` goes on")
            reported = True
            time.sleep(self.config.poll_seconds)
