"""The manifest that a new policy version begins with: what it comes from, and when and by which code it was made."""

from collections.abc import Sequence
from importlib import metadata

from alignd.v1.policy_manifest_pb2 import Evaluation, PolicyManifest, TrainingLineage

SOURCE_FILE = "source.json"
"""The file of an imported version that names what it was made from; see deploy.importing.origin."""


def new_manifest(
    version: int,
    *,
    reference_version: int,
    parent_version: int = 0,
    training: TrainingLineage | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> PolicyManifest:
    """Returns a manifest without files and probes, which are added once the files are written.

    Args:
        version: the new version.
        reference_version: the version that its KL is measured from; its own for an imported or fine-tuned one.
        parent_version: the version that training began from; 0 for an imported one.
        training: how it was trained; None for an imported one.
        evaluations: what it was measured to be.
    """
    manifest = PolicyManifest(
        version=version,
        reference_version=reference_version,
        parent_version=parent_version,
        training=training,
        evaluations=evaluations,
        code_version=metadata.version("alignd"),
    )
    manifest.create_time.GetCurrentTime()
    return manifest
