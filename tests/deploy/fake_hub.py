"""A fake of the Hugging Face hub, as far as a download asks it, and a process that downloads from it."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """A fake of the Hugging Face hub's API, as far as a download asks it; its models are folders of `root`."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urlsplit(self.path).path.strip("/").split("/")
        self.asked.append(f"{self.command} {self.path}")
        repository = path[2:4] if path[0] == "api" else path[:2]
        folder = self.root.joinpath(*repository)
        if repository[0] == "gated":
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not folder.is_dir():
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path[4:5] == ["revision"] and path[5] != "main":
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path[0] != "api":
            content = folder.joinpath(*path[4:]).read_bytes()
            self.send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            files = {str(each.relative_to(folder)): each for each in sorted(folder.rglob("*")) if each.is_file()}
            siblings = [{"rfilename": name} for name in files]
            tree = [
                {"type": "file", "path": name, "size": each.stat().st_size, "oid": name} for name, each in files.items()
            ]
            info = {"id": "/".join(repository), "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(tree if path[4:5] == ["tree"] else info).encode(), {})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@dataclass
class Hub:
    """The fake hub at work, and a machine that knows it in place of the real one."""

    root: Path
    environment: dict[str, str]
    asked: list[str]

    def download(self, name: str, link: Path, offline: bool = False) -> str:
        """Loads a model there in a process of its own; returns what was wrong, if something was."""
        environment = {**os.environ, **self.environment, "HF_HUB_OFFLINE": str(int(offline))}
        repository, _, revision = name.partition("@")
        command = [sys.executable, "-c", DOWNLOAD, repository, revision, str(link)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.stderr.splitlines()[-1] if done.returncode else ""


DOWNLOAD = "import sys; from deploy.own_model import *; download(sys.argv[1], sys.argv[2] or None, Path(sys.argv[3]))"


@contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    """The fake hub, with no models, and an empty cache to load them to, both in `folder`."""
    root, asked = folder / "hub", list[str]()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (FakeHub,), {"root": root, "asked": asked}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "hf")}
        yield Hub(root, environment, asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
