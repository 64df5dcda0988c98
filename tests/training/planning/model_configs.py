"""The config.json of the models that the recipes are meant for, without fields that do not decide their size."""

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from training.planning.model_size import ModelSize, read_model

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"

CONFIGS: Mapping[str, Mapping[str, object]] = {
    SMOLLM2: {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    QWEN: {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    MISTRAL: {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}


@cache
def size_of(name: str) -> ModelSize:
    """Returns the measured size of one of these models."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(CONFIGS[name]))
        return read_model(path)
