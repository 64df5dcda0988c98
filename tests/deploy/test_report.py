"""The report says what was found, for the eye and for the record, and is one file that shows the same anywhere."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from alignd.v1.policy_service_pb2 import Policy
from deploy.config import AligndConfig
from deploy.demo.plots import draw_plots
from deploy.demo.report import finish, print_report, render_html, write_html
from deploy.demo.result import DemoResult, Example, Frontier, Gain, Stage, Swap, Traffic, TrainingRun, Users
from deploy.demo.summary import training_run
from tests.training.report.made_run import RUN_ID, make_folder, make_lines, make_manifest
from training.data.intervals import Mean, WinRate, win_rate

HOSTILE = "<script>alert('x')</script> [bold]& \"more\""


def won(wins: int, ties: int, losses: int) -> WinRate:
    """The win rate over so many prompts with a pair each, from scores that differ as they must."""
    scores, reference_scores = [1.0] * wins + [0.0] * (ties + losses), [0.0] * (wins + ties) + [1.0] * losses
    return win_rate([[score] for score in scores], [[score] for score in reference_scores])


def make_result(run_id: str = RUN_ID) -> DemoResult:
    """A made-up demo that reads like a real one, of the run that `make_folder` writes."""
    return DemoResult(
        model="SmolLM2-135M-Instruct",
        by_utility=won(91, 2, 35),
        by_reward_model=won(45, 1, 18),
        frontier=Frontier(
            Gain(4.1, Mean(0.061, 0.043, 0.079, 64)),
            {2: Gain(0.193, Mean(0.018, 0.009, 0.027, 64)), 4: Gain(0.636, Mean(0.032, 0.019, 0.045, 64))},
        ),
        run=TrainingRun(
            run_id=run_id,
            version=2,
            reference=1,
            num_rankings=320,
            finding="Version 2 beats the reference policy in 71% of pairs, by the reward model.",
            report=f"runs/{run_id}/REPORT.html",
        ),
        users=Users(count=16, agreement=0.726, utility="deploy.simulation.utility:chat_utility"),
        examples=[
            Example(
                "How do I defrost cooked chicken?",
                "I'm sorry for any confusion, but as an AI I can only share general advice about chicken, and there "
                "are many different ways in which one might consider",
                "Put the chicken in the fridge overnight. If you are in a hurry, use the microwave's defrost setting.",
            ),
            Example("Tell me about LEDs.\n<b>In bold!</b>", HOSTILE, "LEDs are made from semiconductors."),
        ],
        swap=Swap(pause_seconds=0.41, drain_seconds=1.9, probe_error=0.0123),
        traffic=Traffic(samples_served=612, rankings_served=612, failed=0),
        stages=[
            Stage("start", 31),
            Stage("rankings", 190),
            Stage("reward model", 121),
            Stage("PPO", 342),
            Stage("swap", 3),
            Stage("evaluation", 64),
        ],
        machine="2 cores, 24 GiB, Linux x86-64",
        versions={"alignd": "0.1.0", "vllm": "0.32.0", "torch": "2.13.0"},
        command="alignd demo",
        seconds_to_first_ranking=241,
    )


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its text and where it would reach for something else."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.reaches: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "action"} and not (value or "").startswith("#"):
                self.reaches.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_stands_alone_and_links_the_report_of_its_run() -> None:
    html = render_html(make_result())
    page = Page(html)
    assert page.reaches == [f"a href=runs/{RUN_ID}/REPORT.html"]
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http" not in html
    assert not re.search(r"url\((?!#)", html)


def test_page_shows_what_a_policy_wrote_as_text() -> None:
    page = Page(render_html(make_result()))
    assert HOSTILE in page.text
    assert "<b>In bold!</b>" in page.text


def test_page_has_every_plot_with_ids_of_its_own() -> None:
    page = Page(render_html(make_result()))
    assert page.tags.count("svg") == page.tags.count("figcaption") == 3
    assert len(page.ids) == len(set(page.ids))


def test_plots_take_their_colours_from_the_page() -> None:
    svgs = [plot.svg for plot in draw_plots(make_result())]
    assert all("var(--ink-soft)" in svg for svg in svgs)
    assert [svg.count("var(--policy)") > 0 for svg in svgs] == [True, True, False]
    assert not [found for svg in svgs for found in re.findall(r"#[0-9a-f]{6}", svg)]


def test_titles_state_the_finding() -> None:
    titles = [plot.title for plot in draw_plots(make_result())]
    assert titles[0] == "The new policy gains 0.061 of true utility for 4.1 nats; best of 4 gains 0.032 for 0.6"
    assert titles[1] == "Users prefer the new policy in 72% of pairs, on 128 held-out prompts"
    assert titles[-1] == "PPO took 46% of 12.5 minutes"


def test_one_completion_of_each_prompt_gives_a_frontier_without_best_of_n() -> None:
    result = make_result()
    alone = replace(result, frontier=Frontier(Gain(-0.01, result.frontier.new_policy.utility), {}))
    frontier, *_ = draw_plots(alone)
    assert frontier.title == "The new policy gains 0.061 of true utility for 0.0 nats"


def test_without_set_up_the_page_says_that_it_was_not_counted() -> None:
    assert "set-up not counted" in Page(render_html(replace(make_result(), seconds_to_first_ranking=None))).text


@pytest.mark.parametrize("has_report", [True, False])
def test_both_pages_are_there_when_the_demo_ends(tmp_path: Path, has_report: bool) -> None:
    """The link must lead somewhere also if the trainer was ended before it had written its own page."""
    config = AligndConfig(data_dir=tmp_path / "somewhere else" / "demo")
    folder = make_folder(config.runs_dir, make_lines())
    if has_report:
        (folder / "REPORT.html").write_text("the trainer's")
    result = replace(make_result(), run=training_run(config, Policy(version=2, manifest=make_manifest())))
    console = Console(file=io.StringIO(), width=110)
    finish(result, config.data_dir, console)
    (link,) = Page((config.data_dir / "REPORT.html").read_text()).reaches
    linked = config.data_dir / link.removeprefix("a href=")
    assert linked == folder / "REPORT.html"
    assert ("the trainer's" if has_report else "Version 2 beats the reference policy") in linked.read_text()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert str(config.data_dir / "REPORT.html") in text
    assert str(linked) in text
    assert json.loads((config.data_dir / "report.json").read_text())["run"]["report"] == f"runs/{RUN_ID}/REPORT.html"


def test_the_run_is_told_by_its_own_report(tmp_path: Path) -> None:
    config = AligndConfig(data_dir=tmp_path)
    make_folder(config.runs_dir, make_lines())
    run = training_run(config, Policy(version=2, manifest=make_manifest()))
    assert run.finding.startswith("Version 2 beats the reference policy in 71% of pairs of completions of 64 held-out")
    assert (run.run_id, run.version, run.reference, run.num_rankings) == (RUN_ID, 2, 1, 320)
    page = Page(render_html(replace(make_result(), run=run)))
    assert run.finding in page.text


def test_page_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_html(make_result(), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(make_result())


def test_terminal_report_tells_the_figures_and_takes_brackets_for_text() -> None:
    console = Console(file=io.StringIO(), width=110)
    print_report(make_result(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for figure in (
        "71.9%", "utility gained by best of 4", "0.019 to 0.045, at a KL of 0.64 nats", "0.41 s", "612 samples",
        "241 s", "320 rankings", "16 simulated users", "[bold]&",
    ):  # fmt: skip
        assert figure in text


@pytest.mark.parametrize(
    ("rate", "beginning"),
    [
        (won(90, 0, 38), "Users prefer the new policy in 70% of pairs"),
        (won(64, 0, 64), "Users do not clearly prefer either policy"),
        (won(38, 0, 90), "Users prefer the reference policy"),
    ],
)
def test_verdict_follows_the_interval(rate: WinRate, beginning: str) -> None:
    assert replace(make_result(), by_utility=rate).verdict.startswith(beginning)
