"""The report says what was found, for the eye and for the record, and is one file that shows the same anywhere."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from deploy.demo.plots import draw_plots
from deploy.demo.report import print_report, render_html, write_html
from deploy.demo.result import (
    DemoResult,
    Example,
    Lineage,
    RewardModelFigures,
    Stage,
    Swap,
    Traffic,
)
from training.data.intervals import WinRate, win_rate

HOSTILE = "<script>alert('x')</script> [bold]& \"more\""


def won(wins: int, ties: int, losses: int) -> WinRate:
    """The win rate over so many prompts, from scores that differ as they must."""
    return win_rate([1.0] * wins + [0.0] * (ties + losses), [0.0] * (wins + ties) + [1.0] * losses)


def make_result(num_rounds: int = 40) -> DemoResult:
    """A made-up run that reads like a real one."""
    wave = [math.sin(0.9 * i) for i in range(num_rounds)]
    steps = [
        {
            "objective/kl": 0.02 + 9.0 * (i / max(1, num_rounds)) ** 1.4 + 0.2 * abs(w),
            "objective/score": 1.9 * (1 - math.exp(-i / 14)) + 0.08 * w,
            "completion/length": 60 - 0.6 * i + 1.5 * w,
            "completion/eos_rate": min(1.0, 0.12 + 0.02 * i + 0.03 * w),
        }
        for i, w in enumerate(wave)
    ]
    return DemoResult(
        model="SmolLM2-135M-Instruct",
        by_utility=won(91, 2, 35),
        by_reward_model=won(104, 0, 24),
        ppo_steps=steps,
        reward_model=RewardModelFigures(accuracy=0.684, comparisons=384, labeler_agreement=0.726),
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
        lineage=Lineage(
            version=2,
            weight_digest="5c1f" * 16,
            parent=1,
            reference=1,
            algorithm="ppo",
            run_id="20260724-101500-a1",
            seed=0,
            num_rankings=320,
            ranking_ranges=("alignd.rankings.v1, partition 0, offsets 0 to 319",),
            reward_model_digest="9d07" * 16,
        ),
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


def test_page_stands_alone() -> None:
    html = render_html(make_result())
    page = Page(html)
    assert page.reaches == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http" not in html
    assert not re.search(r"url\((?!#)", html)


def test_page_shows_what_a_policy_wrote_as_text() -> None:
    page = Page(render_html(make_result()))
    assert HOSTILE in page.text
    assert "<b>In bold!</b>" in page.text


def test_page_has_every_plot_with_ids_of_its_own() -> None:
    page = Page(render_html(make_result()))
    assert page.tags.count("svg") == page.tags.count("figcaption") == 6
    assert len(page.ids) == len(set(page.ids))


def test_plots_take_their_colours_from_the_page() -> None:
    svgs = [plot.svg for plot in draw_plots(make_result())]
    assert all("var(--ink-soft)" in svg for svg in svgs)
    assert [svg.count("var(--policy)") > 0 for svg in svgs] == [True, True, True, True, False, False]
    assert not [found for svg in svgs for found in re.findall(r"#[0-9a-f]{6}", svg)]


def test_titles_state_the_finding() -> None:
    titles = [plot.title for plot in draw_plots(make_result())]
    assert titles[0] == "Users prefer the new policy on 72% of 128 held-out prompts"
    assert titles[-1] == "PPO took 46% of 12.5 minutes"


def test_a_run_of_one_step_and_one_of_none_are_told_too() -> None:
    one = make_result(num_rounds=1)
    assert len(draw_plots(one)) == 6
    assert len(draw_plots(replace(one, ppo_steps=[]))) == 3
    assert "Where version 2 comes from" in render_html(replace(one, ppo_steps=[], seconds_to_first_ranking=None))


def test_page_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_html(make_result(), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(make_result())


def test_terminal_report_tells_the_figures_and_takes_brackets_for_text() -> None:
    console = Console(file=io.StringIO(), width=110)
    print_report(make_result(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for figure in ("71.9%", "0.41 s", "68.4%", "612 samples", "241 s", "offsets 0 to 319", "[bold]&", "5c1f5c1f5c1f"):
        assert figure in text


@pytest.mark.parametrize(
    ("rate", "beginning"),
    [
        (won(90, 0, 38), "Users prefer the new policy on 70%"),
        (won(64, 0, 64), "Users do not clearly prefer either policy"),
        (won(38, 0, 90), "Users prefer the reference policy"),
    ],
)
def test_verdict_follows_the_interval(rate: WinRate, beginning: str) -> None:
    assert replace(make_result(), by_utility=rate).verdict.startswith(beginning)
