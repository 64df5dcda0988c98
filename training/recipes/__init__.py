"""Loads recipes: TOML files with values of TrainingConfig, some of which, for machines of several sizes, are here.

A recipe has fields of TrainingConfig only. A field that it does not have keeps its default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training.config import RENAMED, TrainingConfig

FOLDER = Path(__file__).parent


class RecipeError(ValueError):
    """A recipe cannot be used; each line of the message names a field and says what is wrong with it."""


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with alignd."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name_or_path: str | Path) -> TrainingConfig:
    """Loads a recipe that comes with alignd, by its name, or any other recipe, by the path of its .toml file.

    Raises:
        RecipeError: there is no such recipe, it is not TOML, or a field is unknown, of the wrong type or out of range.
    """
    path = _find(str(name_or_path))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        # Strict: a number in quotes is a mistake, not a number.
        return TrainingConfig.model_validate(values, strict=True)
    except ValidationError as error:
        lines = [f"{path.name}: {_field(each['loc'])}: {_says(each)}" for each in error.errors()]
        raise RecipeError("\n".join(lines)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: {error}") from error


def _find(name: str) -> Path:
    if name in recipe_names():
        return FOLDER / f"{name}.toml"
    if not name.endswith(".toml"):
        raise RecipeError(f"there is no recipe {name!r}: take one of {', '.join(recipe_names())}, or a .toml file")
    return Path(name)


def _field(steps: tuple[str | int, ...]) -> str:
    return ".".join(str(step) for step in steps) or "the recipe"


def _says(error: Mapping[str, Any]) -> str:
    if error["type"] != "extra_forbidden":
        return str(error["msg"]).removeprefix("Value error, ")
    renamed = RENAMED.get(_field(error["loc"]))
    return f"is called {renamed} now" if renamed else "there is no such field"
