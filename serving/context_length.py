"""How many tokens of a prompt and its completion the engine takes: as many as are set, else as the model takes."""

import json
from pathlib import Path

from serving.config import ServingConfig

DEFAULT_MAX_MODEL_LEN = 1024


def max_model_len(config: ServingConfig, folder: Path) -> int:
    """Returns the configured length; if none is, the default, or what the model in `folder` takes if that is less."""
    if config.max_model_len is not None:
        return config.max_model_len
    return min(DEFAULT_MAX_MODEL_LEN, max_positions(folder) or DEFAULT_MAX_MODEL_LEN)


def max_positions(folder: Path) -> int | None:
    """Returns the most tokens that a model takes, if its config.json says."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("text_config", config) if isinstance(config, dict) else {}
    positions = found.get("max_position_embeddings") if isinstance(found, dict) else None
    return positions if isinstance(positions, int) and positions > 0 else None


def too_long(config: ServingConfig, folder: Path, said: str) -> str:
    """Returns by name what is wrong if vLLM refused the configured length; empty if it said something else."""
    if config.max_model_len is None or "max_model_len" not in said:
        return ""
    takes = max_positions(folder)
    return (
        f"serving.max_model_len: {config.max_model_len} is more than the model takes"
        f"{f' ({takes})' if takes else ''}; lower it, or leave it out to follow the model"
    )
