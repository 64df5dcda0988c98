"""Rankings in, a live policy version out; then demonstrations in, a reference out: what a trainer and SFT leave."""

import asyncio
import json
import shutil
import signal
import statistics
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import grpc
import pytest

from alignd.v1 import policy_service_pb2, policy_service_pb2_grpc
from feedback.bus.topics import RANKINGS
from policies.artifact import verify_artifact
from tests.training.stored_feedback import REFUSED, write_demonstrations, write_rankings, write_refused
from tests.training.trainer_process import (
    CONFIG,
    Serving,
    finished_run,
    has_reached,
    killed_when,
    lines,
    make_sft,
    policy_service,
    sft_command,
    start_trainer,
)
from training.config import TrainingConfig
from training.data.best_of_n import best_of_n
from training.data.intervals import win_rate
from training.data.split import is_held_out
from training.data.waiting import Counted, read_counted
from training.loop import Cursor
from training.runs.folder import SFT_SUFFIX

NUM_READ = 17  # rankings, one of which cannot be rendered

pytestmark = pytest.mark.timeout(400)  # vLLM starts four times


@dataclass(frozen=True)
class Made:
    """What a trainer and SFT made, one after the other, of one store."""

    policies_dir: Path
    runs_dir: Path
    run: Path
    """The folder of the trainer's run."""
    live: policy_service_pb2.Policy
    exit_code: int
    """The trainer's, after SIGTERM."""
    tuned_run: Path
    """The folder of the run of SFT that was killed twice."""
    tuned: policy_service_pb2.Policy
    ended: subprocess.CompletedProcess[str]
    """The SFT that ended that run."""
    again: subprocess.CompletedProcess[str]
    """Another, which nobody killed."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Made:
    """Made with a model whose template refuses one message, which an earlier model's may have taken."""
    folder = tmp_path_factory.mktemp("loop")
    model = shutil.copytree(tiny_folder, folder / "model")
    template = model / "chat_template.jinja"
    refusal = f"{{% if messages[0]['content'] == '{REFUSED}' %}}{{{{ raise_exception('refused') }}}}{{% endif %}}"
    template.write_text(refusal + template.read_text())
    return asyncio.run(make(folder, model))


async def make(folder: Path, model: Path) -> Made:
    runs, store_url = folder / "runs", f"sqlite:///{folder}/store.db"
    async with policy_service(folder, model) as serving:
        write_rankings(store_url, 16)
        write_refused(store_url)
        trainer = start_trainer(serving, folder)
        try:
            run = await finished_run(runs, trainer)
            live = await policy(serving, "live")
            while read_counted(runs, NUM_READ) is None:
                assert trainer.poll() is None
                await asyncio.sleep(0.05)
            trainer.send_signal(signal.SIGTERM)
            exit_code = await asyncio.to_thread(trainer.wait, 20)
        finally:
            trainer.kill()
            trainer.wait()
        write_demonstrations(store_url, 16)
        # Before its first epoch, and again after it.
        for phase in ("sft_reference", "sft"):
            await killed_when(partial(has_reached, phase, runs), subprocess.Popen(sft_command(serving, folder)))
        ended = await make_sft(serving, folder)
        tuned_run = max(runs.glob("*/metrics.jsonl")).parent
        again = await make_sft(serving, folder)
        tuned = await policy(serving, "v3")
    return Made(serving.policies_dir, runs, run, live, exit_code, tuned_run, tuned, ended, again)


async def policy(serving: Serving, name: str) -> policy_service_pb2.Policy:
    async with grpc.aio.insecure_channel(serving.address) as channel:
        stub = policy_service_pb2_grpc.PolicyServiceStub(channel)
        found: policy_service_pb2.Policy = (
            await stub.GetPolicy(policy_service_pb2.GetPolicyRequest(policy=name))
        ).policy
    return found


def told(run: Path, *kinds: str) -> dict[str, object]:
    """Returns what a run's first line of metrics says of what it read of these kinds."""
    first = lines(run / "metrics.jsonl")[0]
    return {name: value for name, value in first.items() if name.partition("/")[0] in kinds}


def learned_from() -> list[int]:
    """Returns which rankings are learned from.

    Of the seventeen, the three oldest are more than `max_rankings`, and the last one cannot be rendered.
    """
    return [index for index in range(3, 16) if not is_held_out(f"user-{index % 4}", 0.4)]


def test_rankings_become_a_live_policy(made: Made) -> None:
    logged = lines(made.run / "metrics.jsonl")
    assert logged[-1] == logged[-1] | {"phase": "done", "version": 2}
    live = made.live
    assert (live.version, live.manifest.parent_version, live.manifest.reference_version) == (2, 1, 1)
    manifest = verify_artifact(made.policies_dir / "v2", made.policies_dir / "v1")
    assert manifest == live.manifest
    assert 0 < manifest.training.num_rankings == len(learned_from()) < 14
    (ranges,) = manifest.training.rankings
    assert (ranges.topic, ranges.first_offset, ranges.last_offset) == (RANKINGS, learned_from()[0], learned_from()[-1])
    assert len(manifest.probes) == 2
    won, kl = manifest.evaluations
    assert (won.count, kl.count) == (8, 8)
    last = [line for line in logged if line["phase"] == "ppo"][-1]
    assert abs(kl.value - float(cast(float, last["objective/kl"]))) < 1


def test_the_trainer_ends_when_asked_and_knows_what_it_has_seen(made: Made) -> None:
    assert made.exit_code == 0
    assert Cursor(made.runs_dir / "rankings_seen").read() == NUM_READ
    assert read_counted(made.runs_dir, NUM_READ) == Counted(NUM_READ, 0, {})


def test_a_run_leaves_its_metrics_its_samples_and_its_report(made: Made) -> None:
    steps = [line for line in lines(made.run / "metrics.jsonl") if line["phase"] == "ppo"]
    assert [line["index"] for line in steps] == [0, 1]
    assert {"objective/kl", "objective/score", "policy/clipfrac", "completion/eos_rate"} <= steps[0].keys()
    assert TrainingConfig.model_validate_json((made.run / "recipe.json").read_text()) == CONFIG
    (unsure,) = lines(made.run / "label_next.jsonl")
    assert (unsure["sample_id"], len(cast(str, unsure["completions"]))) == ("unranked 0", 2)
    assert "version 2" in (made.run / "REPORT.html").read_text()
    assert not (made.run / "state").exists()
    assert json.loads((made.run / "manifest.json").read_text())["version"] == 2


def test_the_samples_are_what_the_evaluation_counted(made: Made) -> None:
    """All completions of both policies, with the scores from which win rate and best of n follow."""
    samples = lines(made.run / "samples.jsonl")
    assert [line["index"] for line in samples] == [0, 1, 2] * 8
    assert len({cast(str, line["prompt"]) for line in samples}) == 8
    before, after = (
        [[cast(float, line[f"{which}_score"]) for line in samples[start : start + 3]] for start in range(0, 24, 3)]
        for which in ("before", "after")
    )
    reference = [score for each in before for score in each]
    assert (statistics.fmean(reference), statistics.stdev(reference)) == pytest.approx((0, 1), abs=1e-4)

    found = {str(line["phase"]): line for line in lines(made.run / "metrics.jsonl")}
    won, evaluated = win_rate(after, before), found["evaluate"]
    assert (won.wins, won.ties, won.losses, won.count) == tuple(
        evaluated[key] for key in ("wins", "ties", "losses", "prompts")
    )
    assert (won.low, won.high) == pytest.approx((evaluated["low"], evaluated["high"]))
    assert evaluated["score"] == pytest.approx(statistics.fmean(map(statistics.fmean, after)))
    table = cast(list[list[float]], found["normalise"]["best_of_n"])
    expected = [(each.n, each.kl, statistics.fmean(each.values)) for each in best_of_n(before, before)]
    assert [row[0] for row in table] == [1, 2]
    assert [tuple(row[:3]) for row in table] == [pytest.approx(row, abs=1e-5) for row in expected]


def test_sft_leaves_a_pair_of_each_prompt_without_scores(made: Made) -> None:
    first = lines(made.tuned_run / "samples.jsonl")[0]
    assert (first["index"], first["before_score"], first["after_score"]) == (0, None, None)


def test_a_run_says_what_it_read_and_what_it_left_out(made: Made) -> None:
    num_learned = len(learned_from())
    assert told(made.run, "rankings", "prompts") == {
        "rankings/read": 17, "rankings/learned": num_learned, "rankings/measured": 13 - num_learned,
        "rankings/left_out/older": 3, "rankings/left_out/not_rendered": 1,
        "rankings/unrendered": "refused (TemplateError: refused)",
        "prompts/read": 17, "prompts/learned": 8, "prompts/measured": 8, "prompts/left_out/not_rendered": 1,
        "prompts/unrendered": "refused (TemplateError: refused)",
    }  # fmt: skip
    assert told(made.tuned_run, "demonstrations") == {
        "demonstrations/read": 18, "demonstrations/learned": 8, "demonstrations/measured": 8,
        "demonstrations/left_out/not_rendered": 1, "demonstrations/left_out/prompt_too_long": 1,
        "demonstrations/unrendered": "refused (TemplateError: refused)",
    }  # fmt: skip


def test_demonstrations_become_a_reference(made: Made) -> None:
    """By the reward model of the run before, SFT can choose an epoch."""
    assert "made 3" in made.ended.stdout, made.ended.stderr
    assert made.tuned.stage == policy_service_pb2.STAGE_CANDIDATE
    manifest = made.tuned.manifest
    assert (manifest.parent_version, manifest.reference_version) == (1, 3)
    assert manifest.training.algorithm == "sft"
    assert manifest.weight_digest != made.live.manifest.weight_digest
    phases = [line["phase"] for line in lines(made.tuned_run / "metrics.jsonl")]
    assert phases == ["data", "sft_reference", "sft", "sft", "register", "done"]
    left = {path.name for path in made.tuned_run.iterdir()}
    assert left == {"recipe.json", "metrics.jsonl", "samples.jsonl", "manifest.json", "REPORT.html", "tensorboard"}
    page = (made.tuned_run / "REPORT.html").read_text()
    assert "Version 3 is the reference policy fine-tuned on demonstrations, epoch" in page
    assert "Where version 3 comes from" in page


def test_sft_that_was_killed_makes_what_one_does_that_lives(made: Made) -> None:
    assert "made 4" in made.again.stdout, made.again.stderr
    assert verify_artifact(made.policies_dir / "v4").weight_digest == made.tuned.manifest.weight_digest
    assert len(list(made.runs_dir.glob(f"*{SFT_SUFFIX}"))) == 2
