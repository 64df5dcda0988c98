"""What operators and the trainer do with versions of the shared server, while callers keep calling."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from alignd.v1.policy_manifest_pb2 import PolicyManifest
from alignd.v1.policy_service_pb2 import (
    STAGE_CANDIDATE,
    GetPolicyRequest,
    ListPoliciesRequest,
    Policy,
    PromoteRequest,
    RegisterPolicyRequest,
    ReplicaStatus,
)
from tests.serving import versions
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, chat, draw, sampling
from tests.serving.processes import Server, wait_until
from tests.serving.versions import write_version

SWAP_SECONDS = 60.0
QUESTIONS = ("Why is the sky blue?", "How do I cook?", "Tell me of the garden.", "What is the time?", "Who sleeps?")


def get(stubs: Stubs, version: int) -> Policy:
    return stubs.policies.GetPolicy(GetPolicyRequest(policy=f"v{version}"), timeout=TIMEOUT_SECONDS).policy  # type: ignore[no-any-return]


def replica(stubs: Stubs) -> ReplicaStatus:
    (status,) = stubs.policies.ListPolicies(ListPoliciesRequest(), timeout=TIMEOUT_SECONDS).replicas
    return status  # type: ignore[no-any-return]


def live_version(stubs: Stubs) -> int:
    return int(stubs.policies.ListPolicies(ListPoliciesRequest(), timeout=TIMEOUT_SECONDS).live_version)


def wait_served(stubs: Stubs, version: int) -> None:
    wait_until(lambda: replica(stubs).policy.version == version, SWAP_SECONDS, f"v{version} served")


def next_version(root: Path) -> int:
    return max(int(path.name[1:]) for path in root.glob("v*")) + 1


def registration(path: Path, manifest: PolicyManifest, **fields: Any) -> RegisterPolicyRequest:
    given = {"manifest": manifest, "artifact_uri": str(path), "actor": "test", "reason": "a test", **fields}
    return RegisterPolicyRequest(**given)


def new_version(stubs: Stubs, root: Path, **options: Any) -> tuple[Path, PolicyManifest]:
    """Writes a version to disk and registers it."""
    path, manifest = write_version(root, root / "v1", next_version(root), **options)
    registered = stubs.policies.RegisterPolicy(registration(path, manifest), timeout=TIMEOUT_SECONDS).policy
    assert (registered.version, registered.stage) == (manifest.version, STAGE_CANDIDATE)
    return path, manifest


def promote(stubs: Stubs, version: int, **fields: Any) -> Policy:
    request = PromoteRequest(version=version, actor="test", reason="a test", **fields)
    return stubs.policies.Promote(request, timeout=TIMEOUT_SECONDS).policy  # type: ignore[no-any-return]


class Load:
    """What callers saw that never stop calling."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []
        self.faults: list[str] = []
        self.stop = threading.Event()

    def call(self, address: str, number: int) -> None:
        with grpc.insecure_channel(address) as channel:
            stubs = Stubs(channel)
            for turn in itertools.count():
                if self.stop.is_set():
                    return
                try:
                    prompt = chat(f"{number}: {QUESTIONS[turn % len(QUESTIONS)]}")
                    response = draw(stubs, prompt=prompt, sampling=sampling(max_tokens=40))
                except grpc.RpcError as error:
                    self.faults.append(str(error))
                    return
                self.seen += [versions.names(completion) for completion in response.completions]
                self.faults += ["spans a swap" for completion in response.completions if completion.spans_swap]


@contextmanager
def load(server: Server, num_callers: int = 6) -> Iterator[Load]:
    """Calls the server for as long as the block runs; no call may fail."""
    running = Load()
    callers = [threading.Thread(target=running.call, args=(server.address, number)) for number in range(num_callers)]
    for caller in callers:
        caller.start()
    try:
        yield running
    finally:
        running.stop.set()
        for caller in callers:
            caller.join()
    assert running.faults == []


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)


def remove_a_file(path: Path) -> None:
    (path / "config.json").unlink()


def add_a_file(path: Path) -> None:
    (path / "more.json").write_text("{}")


def add_a_pickle(path: Path) -> None:
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def remove_all(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
