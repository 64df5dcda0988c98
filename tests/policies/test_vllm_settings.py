"""What an engine finds on a CPU: no compiler is called, and what is missing on the machine is named."""

import importlib.util
import logging
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from policies import vllm_settings
from policies.vllm_settings import MissingError, check_compiler, cpu_options, keep_content_out_of_log, prepare_cpu

COMPILED = """
import sys, torch, torch._dynamo
from policies.vllm_settings import prepare_cpu
if sys.argv[1] == "prepared":
    prepare_cpu()
print(torch.compile(lambda ones: ones + 1)(torch.ones(2)).tolist())
"""


def run_compiled(argument: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Calls a function under torch.compile where the compiler does not work, and nothing is cached."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    environment |= {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", COMPILED, argument]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_nothing_is_compiled_on_a_cpu_even_if_torch_was_imported_before(tmp_path: Path) -> None:
    assert run_compiled("prepared", tmp_path).stdout == "[2.0, 2.0]\n"
    assert "/bin/false" in run_compiled("as torch is", tmp_path).stderr


def test_what_somebody_set_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*vllm_settings.CPU_ENVIRONMENT, "TORCH_COMPILE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    prepare_cpu()
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["TORCH_COMPILE_DISABLE"]) == ("PASSIVE", "1")


def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_settings, "NUMA_LIBRARY", "libnuma-of-nobody.so.1")
    with pytest.raises(MissingError, match=r"libnuma-of-nobody\.so\.1.*apt-get install libnuma1"):
        prepare_cpu()


def test_a_prompt_is_never_longer_than_what_is_read_at_once() -> None:
    assert cpu_options(100_000)["max_num_batched_tokens"] == 100_000
    assert cpu_options(512)["max_num_batched_tokens"] > 512


def test_what_compiling_takes_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", "/bin/true")
    with pytest.raises(MissingError, match=r"needs Python's headers \(.*Python\.h\); install") as raised:
        check_compiler()
    assert "compiler (" not in str(raised.value)
    (tmp_path / "Python.h").touch()
    check_compiler()
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(MissingError, match=r"a C compiler \(.*/cc\)"):
        check_compiler()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match=r"a C compiler \(gcc or clang\)"):
        check_compiler()


def test_what_vllm_logs_of_a_failed_request_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    keep_content_out_of_log()
    with caplog.at_level(logging.INFO, logger="vllm"):
        logging.getLogger("vllm.logging_utils.dump_input").error("Dumping input data: stop=%s", ["what a user wrote"])
        logging.getLogger("vllm.v1.core.sched.scheduler").error("Unexpected: grammar rejected tokens %s for %s", [7], 1)
        logging.getLogger("vllm.v1.core.sched.scheduler").error("no room")
    assert [each.getMessage() for each in caplog.records] == ["no room"]


def test_the_loggers_that_are_kept_quiet_are_those_of_this_vllm() -> None:
    for name in ("logging_utils.dump_input", "v1.structured_output.backend_guidance", "v1.core.sched.scheduler"):
        source = Path(str(importlib.util.find_spec("vllm").origin)).parent / f"{name.replace('.', '/')}.py"  # type: ignore[union-attr]
        assert "logger = init_logger(__name__)" in source.read_text()
