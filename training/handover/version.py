"""The end of a run: writes the new version with its lineage, registers it with serving, and asks for it to go live."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from alignd.v1.policy_manifest_pb2 import Evaluation, LogRange, PolicyManifest, TrainingLineage
from alignd.v1.policy_service_pb2 import STAGE_CANDIDATE, Policy
from feedback import heartbeat
from policies.artifact import MANIFEST, ArtifactError, UnreadableError, read_manifest, write_artifact
from policies.location import version_folders
from policies.manifest import new_manifest
from training.context import Rewards, Run, TrainerContext
from training.data.intervals import Mean, WinRate
from training.handover.probes import probes_of
from training.handover.verdict import KL, WIN_RATE, Verdict
from training.models.policy import save_weights
from training.runs.folder import RunFolder
from training.runs.policy_client import PolicyClient

# A run that was killed is looked for among this many of the newest versions.
_RECENT = 20


def write_version(run: Run, rewards: Rewards, weights: Mapping[str, Tensor], verdict: Verdict) -> Path:
    """Writes the version that PPO made, and returns its folder."""
    config, prompts = run.config, run.data.training_prompts
    manifest = new_manifest(
        next_version(run.context),
        parent_version=run.parents.live.version,
        reference_version=run.parents.reference.version,
        training=TrainingLineage(
            run_id=run.folder.path.name,
            algorithm="ppo-ptx" if config.ppo.ptx.data else "ppo",
            recipe_json=config.model_dump_json(),
            seed=config.seed,
            reward_model_digest=rewards.fitted.digest,
            rankings=[LogRange(**asdict(each)) for each in rewards.fitted.rankings],
            num_rankings=rewards.fitted.num_rankings,
            num_prompts=len(prompts),
            prompts_digest=_digest(prompt.sample_id for prompt in prompts),
        ),
        evaluations=[_evaluation(WIN_RATE, verdict.won), _evaluation(KL, verdict.kl)],
    )
    probed = [prompt.token_ids for prompt in run.evaluation_prompts]
    return write_files(run.context, manifest, weights, run.parents.reference_folder, probed, config.num_probes)


def write_files(
    context: TrainerContext,
    manifest: PolicyManifest,
    weights: Mapping[str, Tensor],
    settings_from: Path,
    probed: Sequence[Sequence[int]],
    num_probes: int,
) -> Path:
    """Writes a version with its probes, and returns its folder.

    Args:
        context: says where versions are written.
        manifest: the version's manifest, without files and probes.
        weights: the whole policy, in bf16.
        settings_from: the folder of the version whose tokenizer and configuration are copied.
        probed: token sequences that probes are made of.
        num_probes: the most probes that are made.
    """

    def write(draft: Path) -> None:
        save_weights(draft, weights, settings_from)
        manifest.probes.extend(probes_of(draft, probed, num_probes))

    written, _ = write_artifact(context.policies_dir, manifest, write, heartbeat.beat)
    return written


def is_made(context: TrainerContext, run_id: str) -> bool:
    """Whether an earlier attempt at this run has already written its version."""
    return _registered_by(context.client, run_id) is not None or _written_by(context.policies_dir, run_id) is not None


def hand_over(context: TrainerContext, folder: RunFolder, reason_of: Callable[[PolicyManifest], str]) -> Policy:
    """Registers this run's version as a candidate, unless it is registered already, and returns it."""
    run_id = folder.path.name
    registered = _registered_by(context.client, run_id)
    if registered:
        return registered
    written = _written_by(context.policies_dir, run_id)
    assert written, f"run {run_id} has written no version"
    manifest = read_manifest(written)
    shutil.copyfile(written / MANIFEST, folder.path / MANIFEST)
    return context.client.register(manifest, written, f"run {run_id}: {reason_of(manifest)}")


def go_live(context: TrainerContext, folder: RunFolder, policy: Policy) -> int:
    """Asks for the version to go live if its win rate and its KL allow it, and returns its number. It may be repeated.

    KL is checked again here, because PPO has checked it before each update, but not after the last one.
    """
    config, manifest = folder.config(), policy.manifest
    won, kl = manifest.evaluations
    promoted = config.promote and won.low > config.min_win_rate and kl.value <= config.ppo.max_kl
    if promoted and policy.stage == STAGE_CANDIDATE:
        reason = f"run {folder.path.name}: {reason_of(manifest)}"
        promoted = context.client.promote(manifest.version, folder.origin().live_version, reason)
    folder.rewind("register", 0)
    folder.log("register", 0, 1, {"version": manifest.version, "promoted": float(promoted)})
    return manifest.version


def reason_of(manifest: PolicyManifest) -> str:
    """Returns in words how good a version made by PPO is."""
    won, kl = manifest.evaluations
    return f"win rate {won.value:.0%} over the reference, by the reward model, at a KL of {kl.value:.1f} nats"


def next_version(context: TrainerContext) -> int:
    """Returns the first version that is neither registered nor on disk.

    A folder that was never registered belongs to a run that was given up: its number stays unused.
    """
    registered = (policy.version for policy in context.client.newest(1))
    return max([*registered, *version_folders(context.policies_dir)], default=0) + 1


def _registered_by(client: PolicyClient, run_id: str) -> Policy | None:
    """Returns the version that this run has registered: an attempt may have been killed after it did."""
    return next((each for each in client.newest(_RECENT) if each.manifest.training.run_id == run_id), None)


def _written_by(policies_dir: Path, run_id: str) -> Path | None:
    """Returns the folder of the version that this run has written: an attempt may have ended before registration."""
    folders = version_folders(policies_dir)
    recent = [folders[version] for version in sorted(folders, reverse=True)[:_RECENT]]
    return next((folder for folder in recent if _run_of(folder) == run_id), None)


def _run_of(folder: Path) -> str:
    try:
        return read_manifest(folder).training.run_id
    except UnreadableError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return ""
        # What cannot be read now may be what is looked for: without it, the run would make its version twice.
        raise OSError(str(error)) from error
    except ArtifactError:
        return ""


def _evaluation(name: str, found: WinRate | Mean) -> Evaluation:
    return Evaluation(name=name, value=found.value, low=found.low, high=found.high, count=found.count)


def _digest(sample_ids: Iterable[str]) -> str:
    """Returns the SHA-256 over the sorted sample ids, one on each line."""
    return hashlib.sha256("".join(f"{sample_id}\n" for sample_id in sorted(sample_ids)).encode()).hexdigest()
