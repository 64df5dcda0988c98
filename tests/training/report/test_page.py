"""The report has a run's figures, also of a run that stopped early, and is one file that looks the same anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.training.report.made_run import HOSTILE, READ, START, make_folder, make_lines, phase, ppo_step
from training.report.page import write_report
from training.runs.folder import SamplePair

NUM_PLOTS = 8


class Page(HTMLParser):
    """A page as a browser would read it: its tags, its text, and the links that it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.text = ""
        self.reaches: list[str] = []
        self.ids: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "action"} and not (value or "").startswith("#"):
                self.reaches.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def ended(lines: Sequence[Mapping[str, Any]], reason: str) -> list[Mapping[str, Any]]:
    """Returns the lines, with one more that says why there are no others."""
    return [*lines, {"time": START + 999, "phase": "stopped", "index": 0, "count": 1, "reason": reason}]


def report_of(root: Path, lines: Sequence[Mapping[str, Any]], **folder: Any) -> Page:
    return Page(write_report(make_folder(root, lines, **folder)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Writes the report of a run that came to its end."""
    return report_of(tmp_path_factory.mktemp("whole"), make_lines())


def test_page_stands_alone(page: Page) -> None:
    assert page.reaches == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http" not in page.html
    assert not re.search(r"url\((?!#)", page.html)
    assert len(page.ids) == len(set(page.ids))


def test_page_shows_what_a_policy_wrote_as_text(page: Page) -> None:
    for text in (HOSTILE, "<b>In bold!</b>", "a lone surrogate: \\ud83d", "On 4 July 1776, in Philadelphia."):
        assert text in page.text


def test_page_names_what_to_label_next_the_least_sure_first(page: Page) -> None:
    places = [page.text.index(f"Unranked question {index}?") for index in range(7)]
    assert places == sorted(places)
    assert "the heads differ by 1.25" in page.text
    assert page.text.count("2 more") == 1


def test_page_has_every_plot_in_the_colours_of_the_page(page: Page) -> None:
    svgs = re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL)
    assert len(svgs) == page.tags.count("figcaption") == NUM_PLOTS
    assert all("var(--ink-soft)" in svg for svg in svgs)
    assert not [color for svg in svgs for color in re.findall(r"#[0-9a-f]{6}\b", svg)]
    drawn_in = {name: [name in svg for svg in svgs] for name in ("--held-out-model", "--value", "--reward-model")}
    assert drawn_in["--held-out-model"] == [True] + 7 * [False]
    assert drawn_in["--value"] == [False, False, False, True, True, False, False, False]
    assert drawn_in["--reward-model"] == [True, False, False, False, False, True, True, True]


def test_page_says_what_became_of_all_that_was_read(tmp_path: Path) -> None:
    page = report_of(tmp_path, [READ, *make_lines(5)])
    assert (
        "320 learned from, 90 to measure with, 90 left out: 88 held out by user or by prompt, but not by both, "
        "2 of a sample that cannot be rendered"
    ) in page.text
    assert "s17 (TemplateError: <b>no system turn</b>); s18 (KeyError: 99)" in page.text


def test_page_has_the_figures(page: Page) -> None:
    for figure in (
        "71.1%",
        "59.0% to 80.6%; of the pairs of 64 held-out prompts, 725 won, 6 tied, 293 lost",
        "68.4%", "64.2% to 72.6%; 912", "67.1%", "64% to 71%",
        "gsm8k/accuracy", "0.03 to 0.055; n = 1319", "nats a completion; 95% interval 5.4 to 6.4; n = 64",
        "5c1f5c1f", "offsets 0 to 319", "pretraining weight γ", "0.580",
        "ppo.target_kl", "default: not set", "PPO’s 19.8 minutes", "the policy’s tokens", "1 more",
    ):  # fmt: skip
        assert figure in page.text, figure
    assert "Why it stopped" not in page.text


def test_the_frontier_has_best_of_n_and_the_result_beside_the_rounds(tmp_path: Path, page: Page) -> None:
    for words in ("best of 4", "reference policy’s best of 1, 2, 4, … completions", "Stars: the new policy’s answers"):
        assert words in page.text
    found = {"best_of_n", "score", "held_out_score"}
    lines = [{key: value for key, value in line.items() if key not in found} for line in make_lines(4)]
    text = report_of(tmp_path, lines).text
    assert "score, by the held-out reward model" in text
    assert not any(words in text for words in ("best of", "Diamonds", "Stars"))


@pytest.mark.parametrize(
    "table", [[], [[1, 0.0, 0.0]], [[1, 0.0, math.nan, 0.0]], [None], "no table", [[1, 0.0, 0.0, 0.0]]]
)
def test_a_frontier_without_best_of_n_that_can_be_drawn_is_still_one(tmp_path: Path, table: object) -> None:
    lines = [line | {"best_of_n": table} if line["phase"] == "normalise" else line for line in make_lines(4)]
    assert report_of(tmp_path, lines).tags.count("figcaption") == NUM_PLOTS


def test_one_pair_of_a_prompt_is_shown_and_at_most_twenty_prompts(tmp_path: Path) -> None:
    pairs = [SamplePair(f"Question {n}?", "", f"Answer {n}.{each}.", each) for n in range(25) for each in range(3)]
    text = report_of(tmp_path, make_lines(2), samples=pairs).text
    assert text.count("Answer ") == 20
    assert "Answer 19.0." in text
    assert not re.search(r"Answer \d+\.[12]", text)


def test_samples_of_earlier_releases_are_shown(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_lines(2), samples=())
    (folder / "samples.jsonl").write_text('{"prompt": "Q?", "before": "Old.", "after": "New."}\n')
    text = Page(write_report(folder)).text
    assert "Old." in text
    assert "New." in text


def test_the_same_run_gives_the_same_page_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_lines())
    before = {path.name for path in folder.iterdir()}
    path = write_report(folder)
    first = path.read_bytes()
    assert write_report(folder).read_bytes() == first
    assert {path.name for path in folder.iterdir()} - before == {"REPORT.html"}


@pytest.mark.parametrize("count", range(0, 10, 3))
def test_a_run_that_stopped_says_why_wherever_it_did(tmp_path: Path, count: int) -> None:
    reason = "reward model: no loss\nsecond line & <more>"
    page = report_of(tmp_path, ended(make_lines(3)[:count], reason), samples=(), manifest=False)
    assert "made no version: reward model: no loss" in page.text
    assert f"The run stopped: {reason}" in page.text
    assert "wrote no samples" in page.text


@pytest.mark.parametrize(
    ("kept", "num_plots"),
    [
        ((), 0),
        (("reward_model",), 0),
        (("reward_model", "reward_model_evaluation"), 2),
        (("ppo",), 6),
        (("evaluate", "register", "done"), 0),
    ],
)
def test_any_phase_may_be_missing(tmp_path: Path, kept: tuple[str, ...], num_plots: int) -> None:
    page = report_of(tmp_path, phase(make_lines(4), *kept), samples=(), manifest=False)
    assert page.tags.count("figcaption") == num_plots


@pytest.mark.parametrize("held_out", [True, False])
def test_the_held_out_model_is_said_to_have_other_labelers_only_where_some_are_held_out(
    tmp_path: Path, held_out: bool
) -> None:
    lines = [line for line in make_lines(4) if held_out or line["phase"] != "reward_model_evaluation"]
    text = report_of(tmp_path, lines).text
    assert "score, by the held-out reward model" in text
    assert ("labelers unknown to the reward model" in text) == held_out


@pytest.mark.parametrize("num_rounds", [1, 2, 250])
def test_short_and_long_runs_have_all_plots(tmp_path: Path, num_rounds: int) -> None:
    assert report_of(tmp_path, make_lines(num_rounds)).tags.count("figcaption") == NUM_PLOTS


@pytest.mark.parametrize("parity", [0, 1])
def test_any_metric_may_be_missing(tmp_path: Path, parity: int) -> None:
    missing = set(list(ppo_step(0, 1))[parity::2])
    lines = [{key: value for key, value in line.items() if key not in missing} for line in make_lines(3)]
    text = report_of(tmp_path, lines, samples=(), manifest=False).text
    assert ("score, by the held-out reward model" in text) == (parity == 1)
    assert ("nats a completion" in text) == (parity == 1)


def test_what_is_not_finite_is_reported_by_name_and_round(tmp_path: Path) -> None:
    lines = make_lines(6)
    for line in phase(lines, "ppo")[2:4]:
        line |= {"policy/loss": math.nan, "objective/kl": math.inf, "val/explained_variance": -math.inf}  # type: ignore[operator]
    page = report_of(tmp_path, lines)
    assert page.tags.count("figcaption") == NUM_PLOTS
    for key in ("policy/loss", "objective/kl", "val/explained_variance"):
        assert f"{key} is not finite" in page.text
    assert "2 of 6 rounds" in page.text
    assert "in round 3, 4" in page.text


def test_a_figure_that_rounds_to_zero_has_no_sign(tmp_path: Path) -> None:
    lines = make_lines(3)
    for line in phase(lines, "ppo"):
        line |= {"objective/kl": -0.001}
    text = report_of(tmp_path, lines).text
    assert re.search(r"(?<!-)0\.00nats", text)
    assert not re.search(r"-0\.00\b", text)


def test_nothing_finite_at_all_still_gives_a_page(tmp_path: Path) -> None:
    lines = [
        {key: math.nan if isinstance(value, float) and key != "time" else value for key, value in line.items()}
        for line in make_lines(5)
    ]
    page = report_of(tmp_path, lines)
    assert page.tags.count("figcaption") == 2  # those of the reward model's tables
    assert "not finite" in page.text


def test_rows_of_the_evaluation_that_rest_on_nothing_are_left_out(tmp_path: Path) -> None:
    tables = {"by_k": [[4, math.nan, 0], [9, 1.0, 10], [6, 0.0, 3]], "calibration": [], "by_length_difference": []}
    lines = [line | tables if line["phase"] == "reward_model_evaluation" else line for line in make_lines(2)]
    page = report_of(tmp_path, lines)
    assert page.tags.count("figcaption") == NUM_PLOTS - 1
    assert "The reward model is right on 77% of held-out comparisons" in page.text  # 10 of 13
    assert "n = 13 held-out comparisons" in page.text


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_lines(2))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "pha{"time": 2}\n[1]\n{"phase": "ppo"}\n{"time": 3, "phase": "stopped"')
    (folder / "recipe.json").write_text("{")
    (folder / "manifest.json").write_text('{"version": "two"}')
    text = Page(write_report(folder)).text
    assert "3 of the lines of metrics.jsonl could not be read" in text
    assert "recipe.json could not be read" in text
    assert "manifest.json is no policy manifest" in text
    assert "The folder has no recipe" in text


def test_ppo_that_stopped_itself_is_reported_with_its_reason(tmp_path: Path) -> None:
    lines = make_lines(5)
    lines[7] |= {"stopped/reason": "KL 8.3 nats passed max_kl, 8.0"}
    page = report_of(tmp_path, lines)
    assert "PPO stopped itself in round 3 of 5." in page.text
    assert "PPO stopped itself in round 3 of 5: KL 8.3 nats passed max_kl, 8.0" in page.text
    assert "Why it stopped" in page.text
