"""Version 1 as an import leaves it, written in a moment: of a model whose files are a version's already."""

import shutil
from pathlib import Path

from policies.artifact import write_artifact
from policies.manifest import new_manifest

_PROBED = (tuple(range(3, 40)), (1, 50, 60, 70, 2))


def write_first(root: Path, model: Path) -> Path:
    """Writes root/v1, with probes, and returns it. Its files are the model's: bf16 weights, without a tied head."""
    # Takes seconds to import.
    from training.handover.probes import probes_of

    manifest = new_manifest(1, reference_version=1)

    def write(draft: Path) -> None:
        for file in model.iterdir():
            shutil.copyfile(file, draft / file.name)
        manifest.probes.extend(probes_of(draft, _PROBED, len(_PROBED)))

    return write_artifact(root, manifest, write)[0]
