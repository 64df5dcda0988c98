"""Finds the public data sets that the learning benchmark reads; none of them is part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

_VARIABLE = "ALIGND_TEST_DATA"
_BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "data"


class DataMissingError(FileNotFoundError):
    """A data set is not where it was looked for."""


def data_file(name: str) -> Path:
    """Returns the path of a file such as "hh-rlhf/helpful-base.test.jsonl.gz".

    It is looked for in the folder that ALIGND_TEST_DATA names, else in ../shared/data as seen from the root of the
    checkout.

    Raises:
        DataMissingError: the file is not there.
    """
    folder = Path(os.environ.get(_VARIABLE) or _BESIDE_THE_CHECKOUT)
    path = folder / name
    if not path.is_file():
        raise DataMissingError(f"there is no {name} in {folder}; set {_VARIABLE} to the folder that holds it")
    return path
