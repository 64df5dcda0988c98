"""The end of a run: its version is written with its lineage, registered with serving, and asked to go live."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from torch import Tensor

from alignd.v1 import policy_manifest_pb2, policy_service_pb2
from policies.artifact import MANIFEST, read_manifest, write_artifact
from training.context import Rewards, Run
from training.data.dataset import TokenizedPrompt
from training.data.intervals import Mean, Verdict, WinRate
from training.handover.probes import probes_of
from training.models.policy import save_weights
from training.runs.policy_client import next_version, prompts_digest

WIN_RATE, KL = "reward_model/win_rate_over_reference", "objective/kl_from_reference"


def _manifest(run: Run, rewards: Rewards, verdict: Verdict) -> policy_manifest_pb2.PolicyManifest:
    """All of the manifest but what depends on the files."""
    data = run.data
    manifest = policy_manifest_pb2.PolicyManifest(
        version=next_version(run.place.client, run.place.policies_dir),
        parent_version=run.parents.live.version,
        reference_version=run.parents.reference.version,
        training=policy_manifest_pb2.TrainingLineage(
            run_id=run.folder.path.name,
            algorithm="ppo-ptx" if run.config.ppo.ptx.data else "ppo",
            recipe_json=run.config.model_dump_json(),
            seed=run.config.seed,
            reward_model_digest=rewards.fitted.digest,
            rankings=[policy_manifest_pb2.LogRange(**asdict(each)) for each in rewards.fitted.rankings],
            num_rankings=rewards.fitted.num_rankings,
            num_prompts=len(data.training_prompts),
            prompts_digest=prompts_digest([prompt.sample_id for prompt in data.training_prompts]),
        ),
        evaluations=[_evaluation(WIN_RATE, verdict.won), _evaluation(KL, verdict.kl)],
        code_version=metadata.version("alignd"),
    )
    manifest.create_time.FromNanoseconds(time.time_ns())
    return manifest


def _evaluation(name: str, found: WinRate | Mean) -> policy_manifest_pb2.Evaluation:
    return policy_manifest_pb2.Evaluation(
        name=name, value=found.value, low=found.low, high=found.high, count=found.count
    )


def write(
    run: Run, rewards: Rewards, weights: Mapping[str, Tensor], verdict: Verdict, probed: Sequence[TokenizedPrompt]
) -> Path:
    """Writes the version, and returns its folder."""
    manifest = _manifest(run, rewards, verdict)
    sequences = [prompt.token_ids for prompt in probed]

    def write_files(draft: Path) -> None:
        save_weights(draft, weights, run.parents.reference_folder)
        manifest.probes.extend(probes_of(draft, sequences, run.config.num_probes))

    written, _ = write_artifact(run.place.policies_dir, manifest, write_files)
    return written


def register(run: Run, written: Path) -> policy_service_pb2.Policy:
    """Registers the version in this folder. Harmless when repeated."""
    manifest = read_manifest(written)
    shutil.copyfile(written / MANIFEST, run.folder.path / MANIFEST)
    return run.place.client.register(manifest, written, _reason(run, manifest))


def _reason(run: Run, manifest: policy_manifest_pb2.PolicyManifest) -> str:
    won, kl = manifest.evaluations
    return (
        f"run {run.folder.path.name}: win rate {won.value:.0%} over the reference, by the reward model, "
        f"at a KL of {kl.value:.1f} nats"
    )


def go_live(run: Run, policy: policy_service_pb2.Policy) -> int:
    """Asks for the version to go live if its win rate and its KL let it. Harmless when repeated.

    PPO sees the KL of each round's policy but of the last, which is the one that it made.
    """
    config, manifest = run.config, policy.manifest
    won, kl = manifest.evaluations
    promoted = config.promote and won.low > config.min_win_rate and kl.value <= config.ppo.max_kl
    if promoted and policy.stage == policy_service_pb2.STAGE_CANDIDATE:
        promoted = run.place.client.promote(manifest.version, run.parents.live.version, _reason(run, manifest))
    run.folder.rewind("register", 0)
    run.folder.log("register", 0, 1, {"version": manifest.version, "promoted": float(promoted)})
    return manifest.version
