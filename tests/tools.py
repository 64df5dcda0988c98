"""Finds the command-line tools that some tests drive the real system with (grpcurl and the like)."""

import os
import shutil
from pathlib import Path

BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "tools" / "bin"


def find_tool(name: str) -> Path:
    """The tool's path: from the folder ALIGND_TEST_TOOLS, then PATH, then ../shared/tools/bin beside the checkout.

    Raises FileNotFoundError, which names the tool and where it was looked for. Tests are never skipped for want of one.
    """
    folders = [os.environ.get("ALIGND_TEST_TOOLS", ""), os.environ.get("PATH", ""), str(BESIDE_THE_CHECKOUT)]
    found = shutil.which(name, path=os.pathsep.join(folder for folder in folders if folder))
    if found is None:
        places = f"neither in ALIGND_TEST_TOOLS nor on PATH nor in {BESIDE_THE_CHECKOUT}"
        raise FileNotFoundError(f"these tests need the tool {name}, which is {places}")
    return Path(found)
