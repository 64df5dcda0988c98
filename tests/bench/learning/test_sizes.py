"""The sizes that the learning benchmark is run in fit together: nothing is found out after hours."""

from pathlib import Path
from typing import Any

import pytest

from bench.learning import __main__ as learning
from bench.learning.experiment import FULL, QUICK, Size
from bench.learning.factors import FACTORS, changed
from bench.learning.online import ONLINE_FULL, ONLINE_QUICK, OnlineSize, stretches
from deploy.models import make_tiny_llama
from training.config import PpoConfig


@pytest.mark.parametrize(("size", "online"), [(QUICK, ONLINE_QUICK), (FULL, ONLINE_FULL)])
def test_the_stages_have_what_they_need(size: Size, online: OnlineSize) -> None:
    assert size.num_demonstrations >= size.sft.min_demonstrations
    assert size.num_samples <= size.num_scored
    assert sum(config.num_rounds for config in stretches(size.ppo, online.num_parts)) == size.ppo.num_rounds
    assert online.num_rankings * online.num_candidates <= 3 * size.num_rankings


def test_the_full_size_is_the_shipped_recipe() -> None:
    assert FULL.ppo == PpoConfig()


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_changes_something_and_draws_as_many_rollouts(factor: str) -> None:
    assert changed(FULL.ppo, factor) != FULL.ppo


def test_a_run_without_names_runs_all_but_what_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(learning, "prepare_smollm2", lambda folder: make_tiny_llama(tmp_path / "tiny"))
    monkeypatch.setattr(learning, "_WORK", tmp_path / "work")
    monkeypatch.setattr(learning, "figures_of", lambda found: [])

    def once(folder: Path, name: str, job: Any) -> dict[str, Any]:
        ran.append(name)
        return {"seeds": []}

    monkeypatch.setattr(learning, "once", once)
    for arguments, names in (
        (["--quick"], ["chat-0", "human"]),
        (["--quick", "--only", "online-0", "factor-ema-0"], ["online-0", "factor-ema-0"]),
    ):
        ran.clear()
        monkeypatch.setattr("sys.argv", ["learning", "--json", str(tmp_path / "found.json"), *arguments])
        learning.main()
        assert ran == names
