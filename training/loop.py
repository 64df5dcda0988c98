"""The training service: waits for enough new rankings, runs, and waits again, for ever."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from training.config import TrainingConfig
from training.errors import TrainingError
from training.publish import START_SECONDS, PolicyClient

if TYPE_CHECKING:
    from feedback.store import Store
    from training.run import Workplace

logger = logging.getLogger(__name__)

CURSOR_FILE = "rankings_seen"


def run_trainer(
    config: TrainingConfig, *, store_url: str, policies_dir: Path, runs_dir: Path, serving_address: str
) -> None:
    """Runs until SIGTERM. A run that fails leaves the live policy as it is, and why in its metrics.jsonl.

    What a kill leaves half done is begun anew from the same rankings: the cursor moves when a run has ended.
    """
    from feedback.store import Store

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    runs_dir.mkdir(parents=True, exist_ok=True)
    with PolicyClient(serving_address) as client:
        place = _open_workplace(config, Store(store_url), client, policies_dir)
        cursor = Cursor(runs_dir / CURSOR_FILE)
        while True:
            _wait_for_rankings(config, place.store, cursor.read())
            last_seq = place.store.last_seq()
            if _run_once(place, runs_dir):
                cursor.write(last_seq)
            else:
                time.sleep(config.poll_seconds)


@dataclass(frozen=True)
class Cursor:
    """The number of the last ranking that a run has seen, on disk."""

    path: Path

    def read(self) -> int:
        """0 before the first run."""
        return int(self.path.read_text()) if self.path.exists() else 0

    def write(self, seq: int) -> None:
        """Replaces it at once or not at all."""
        draft = self.path.with_suffix(".tmp")
        with draft.open("w") as file:
            file.write(str(seq))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)


def _open_workplace(config: TrainingConfig, store: Store, client: PolicyClient, policies_dir: Path) -> Workplace:
    """Starts the rollout engine while rankings are still coming in, but not while the server starts its own."""
    from transformers import AutoTokenizer

    from training.rollouts import RolloutEngine
    from training.run import Workplace, find_parents

    while not client.is_serving():
        time.sleep(config.poll_seconds)
    parents = find_parents(client, START_SECONDS)
    engine = RolloutEngine(
        parents.live_folder,
        max_model_len=config.ppo.max_prompt_tokens + config.ppo.max_tokens,
        max_num_seqs=config.max_num_seqs,
        kv_cache_mib=config.kv_cache_mib,
        seed=config.seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(parents.reference_folder, local_files_only=True)
    return Workplace(config, store, engine, client, policies_dir, tokenizer)


def _wait_for_rankings(config: TrainingConfig, store: Store, seen: int) -> None:
    while store.num_rankings(seen) < config.min_new_rankings:
        time.sleep(config.poll_seconds)


def _run_once(place: Workplace, runs_dir: Path) -> bool:
    """Runs once. False if serving could not be reached or refused: then the same rankings are tried again."""
    from training.run import run
    from training.run_folder import RunFolder

    run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    folder = RunFolder.create(runs_dir, run_id, place.config)
    try:
        version = run(place, folder)
    except TrainingError as error:
        logger.error("run %s stopped: %s", run_id, error)
        folder.log("stopped", 0, 1, {"reason": str(error)})
        return True
    except grpc.RpcError as error:
        logger.error("run %s: serving: %s", run_id, error)
        folder.log("stopped", 0, 1, {"reason": str(error)})
        return False
    logger.info("run %s made version %d", run_id, version)
    folder.log("done", 0, 1, {"version": version})
    return True
