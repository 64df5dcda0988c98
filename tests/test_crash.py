"""kill -9 of any process of `alignd up`, at any moment, on both buses: every acknowledged ranking is stored, once."""

import json
import os
import random
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import select

from alignd.v1.inference_service_pb2 import SampleResponse
from deploy.up import VERBS
from feedback import heartbeat
from feedback.store.engine import open_engine
from feedback.store.tables import RANKINGS
from tests.serving.calls import Stubs, draw, ranking_request, sampling
from tests.serving.processes import (
    address_of,
    end,
    engine_processes,
    environment,
    is_alive,
    is_serving,
    log_of,
    start,
    wait_serving,
    wait_until,
)

FEEDBACK = "alignd.v1.FeedbackService"
RESTART_SECONDS = 40.0
NUM_CLIENTS = 4
# Far less than `alignd up` waits for.
BEAT_SECONDS = 30.0
# Refusals after which the same request is sent again, as applications are told to.
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class Client(threading.Thread):
    """A user who ranks the samples again and again, each time until it is acknowledged, and keeps account of it."""

    def __init__(self, address: str, samples: list[SampleResponse], seed: int) -> None:
        super().__init__()
        self.address = address
        self.samples = samples
        self.chance = random.Random(seed)
        self.stop = threading.Event()
        self.acknowledged: list[str] = []
        self.faults: list[str] = []
        self.num_retries = 0

    def run(self) -> None:
        with grpc.insecure_channel(self.address, options=[("grpc.max_reconnect_backoff_ms", 500)]) as channel:
            stubs = Stubs(channel)
            while not self.stop.is_set():
                self.rank(stubs)
                time.sleep(self.chance.uniform(0, 0.02))

    def rank(self, stubs: Stubs) -> None:
        request = ranking_request(self.chance.choice(self.samples), request_id=str(uuid.uuid4()))
        while True:
            try:
                response = stubs.feedback.SubmitRanking(request, timeout=5)
            except grpc.RpcError as error:
                status: Any = error
                if status.code() not in RETRIED:
                    self.faults.append(str(error))
                    return
                self.num_retries += 1
                time.sleep(0.1)
            else:
                self.acknowledged.append(response.ranking_id)
                return


def pids(settings: Mapping[str, str]) -> dict[str, int]:
    """The processes of `alignd up`, as it tells them."""
    return dict(json.loads((Path(settings["ALIGND_DATA_DIR"]) / "up.json").read_text()))


@contextmanager
def running_up(folder: Path, settings: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`alignd up` until SIGTERM; leaves nothing running."""
    process = start("up", settings)
    seen: set[int] = set()
    try:
        wait_until((folder / "var" / "up.json").is_file, 30, "alignd up", process)
        yield process
        seen = set(pids(settings).values())
        seen |= {engine for pid in seen for engine in engine_processes(pid)}
    finally:
        process.send_signal(signal.SIGTERM)
        code = end(process)
    assert code == 0, log_of("up", settings).read_text()
    wait_until(lambda: not any(is_alive(pid) for pid in seen), 15, "the end of every process")


def kill(verb: str, settings: Mapping[str, str], supervisor: "subprocess.Popen[bytes]") -> None:
    """Kills a process with all its threads at once, and sees it started again and nothing left of the old one."""
    pid = pids(settings)[verb]
    engines = engine_processes(pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pids(settings)[verb] != pid, RESTART_SECONDS, f"{verb} started again", supervisor)
    wait_until(lambda: not any(is_alive(engine) for engine in engines), 15, f"the end of the engine of {verb}")


def stored_rankings(store_url: str) -> list[str]:
    """The id of every row."""
    engine = open_engine(store_url)
    try:
        with engine.connect() as connection:
            return list(connection.execute(select(RANKINGS.c.event_id)).scalars())
    finally:
        engine.dispose()


def wait_for_more(store_url: str) -> None:
    """Returns when rankings go all the way again."""
    before = len(stored_rankings(store_url))
    wait_until(lambda: len(stored_rankings(store_url)) > before, RESTART_SECONDS, "more rankings in the store")


def beat_at(data_dir: Path, verb: str) -> float:
    seen = heartbeat.look(data_dir, verb)
    return seen.at if seen else 0.0


@pytest.mark.timeout(420)
def test_every_acknowledged_ranking_is_stored_once(bus_url: str, tmp_path: Path) -> None:
    chance = random.Random(bus_url)
    settings = environment(tmp_path, bus=bus_url, training__min_new_rankings=10**9, feedback__bus_check_seconds=0.5)
    address, store_url = address_of(settings), f"sqlite:///{tmp_path}/var/store.db"
    with running_up(tmp_path, settings) as supervisor:
        wait_serving(supervisor, settings)
        with grpc.insecure_channel(address) as channel:
            samples = [draw(Stubs(channel), sampling=sampling(max_tokens=2)) for _ in range(10)]
        clients = [Client(address, samples, seed) for seed in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        try:
            for verb in ("relay", "ingest", "train", "relay", "ingest", "serve"):
                wait_for_more(store_url)
                time.sleep(chance.uniform(0, 1))
                kill(verb, settings, supervisor)
            wait_until(lambda: is_serving(address, FEEDBACK), RESTART_SECONDS, "feedback taken again")
            wait_for_more(store_url)
            silent = {verb: time.time() - beat_at(tmp_path / "var", verb) for verb in VERBS}
        finally:
            for client in clients:
                client.stop.set()
            for client in clients:
                client.join()
        acknowledged = [ranking_id for client in clients for ranking_id in client.acknowledged]
        wait_until(lambda: len(stored_rankings(store_url)) >= len(acknowledged), 60, "all in the store")
    assert [fault for client in clients for fault in client.faults] == []
    assert sorted(stored_rankings(store_url)) == sorted(acknowledged)
    assert len(acknowledged) > 200
    assert {verb: seconds for verb, seconds in silent.items() if seconds > BEAT_SECONDS} == {}
    assert sum(client.num_retries for client in clients) > 0, "the server was away for a while"
