"""Tiny random models of each family that the trainer supports or refuses, and the table of them, docs/models.md.

`python -m tests.training.models.families` writes the table anew.
"""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deploy.importing.files import ModelFiles
from deploy.importing.normalise import write_settings, write_weights
from deploy.models import ModelError
from policies.weights import WEIGHTS_FILE
from training.data.groups import Group, pack
from training.models.anatomy import Angles, head_of, windows_of
from training.models.policy import SharedLayers, load_model
from training.models.trial import UnsupportedModelError, check_forward

TABLE = Path(__file__).parents[3] / "docs" / "models.md"
BEGIN, END = "<!-- generated: supported -->\n", "<!-- generated: end -->\n"
WINDOW = 6
_COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
_HEAD = {"head_dim": 32}
_GEMMA = {**_HEAD, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# Settings are those that leave nothing of a family unused: a window shorter than the sequences, a low soft cap.
SUPPORTED: Mapping[str, Mapping[str, Any]] = {
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25, "sliding_window": WINDOW},
    "exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "gemma": {},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_GEMMA, "layer_types": _TYPES, "final_logit_softcapping": 3.0},
    "glm": {},
    "glm4": {},
    "gpt_neox": {"num_key_value_heads": 2},
    "granite": {
        "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 4.0,
    },
    "llama": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": _TYPES},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {"use_parallel_residual": True, "qk_layernorm": True},
    "starcoder2": {"sliding_window": WINDOW},
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 14,
    "patch_size": 14,
}  # fmt: skip
REFUSED: Mapping[str, Mapping[str, Any]] = {
    "apertus": {},
    "bloom": {},
    "falcon": {},
    "gemma3": {"text_config": {**_COMMON, **_GEMMA}, "vision_config": _VISION, "mm_tokens_per_image": 1},
    "gpt2": {},
    "gpt_oss": {"num_local_experts": 2},
    "mixtral": {"num_local_experts": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 64},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}


def make_family(family: str, settings: Mapping[str, Any], folder: Path) -> Path:
    """Writes a random model of a family to `folder`, in bf16, and returns `folder`. No norm or bias is trivial."""
    own = {} if "text_config" in settings else _COMMON
    config = AutoConfig.for_model(family, **{**own, **(_HEAD if family in SUPPORTED else {}), **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor += 0.2 * noise
            else:
                tensor.copy_(noise * 1.5 / math.sqrt(tensor.shape[-1]))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def features_of(folder: Path) -> list[str]:
    """Returns what a family's model does otherwise than Llama's, as far as the trainer must know."""
    model = load_model(folder)
    head = head_of(model)
    packed = pack([Group((1, 5, 6), ((7, 8), (9,)))])
    shared = SharedLayers(model)
    angles, entering = shared.angles(packed), shared.encode(packed, [0])[0]
    embedded = torch.nn.functional.embedding(packed.tokens_GT, model.get_input_embeddings().weight)
    windows = windows_of(model.config)
    features = {
        "a sliding window in all layers": None not in windows,
        "sliding windows in some layers": None in windows and any(windows),
        "rotations that differ by layer": _rotations(angles) > 1,
        "scaled embeddings": not torch.equal(entering, embedded),
        "scaled logits": head.scale != 1,
        "logits with a soft cap": head.cap is not None,
        "attention with a soft cap": bool(getattr(model.config, "attn_logit_softcapping", None)),
        "logits with a bias": head.bias_V is not None,
    }
    return [feature for feature, there in features.items() if there]


def _rotations(angles: Angles) -> int:
    return len({id(arguments["position_embeddings"]) for arguments in angles.arguments})


def refusal(folder: Path) -> str:
    """Returns the first sentence of why the import refuses a model: as it writes it anew, or as it tries that."""
    files = ModelFiles(folder, ("config.json",), (WEIGHTS_FILE,), pickled=False)
    with tempfile.TemporaryDirectory() as draft:
        try:
            write_settings(files, Path(draft))
            write_weights(files, Path(draft))
            check_forward(Path(draft))
        except (ModelError, UnsupportedModelError) as error:
            return str(error).partition(". Supported")[0]
    raise AssertionError(f"{folder} is not refused")


def table(models: Path) -> str:
    """Returns the tables of the models in the folder `models`, one in each folder of its own."""
    lines = ["| `model_type` | architecture | what the trainer does for it that Llama does not need |", "|---|---|---|"]
    for family in SUPPORTED:
        check_forward(models / family)
        architecture = AutoConfig.from_pretrained(models / family).architectures[0]
        lines.append(f"| {family} | {architecture} | {', '.join(features_of(models / family)) or '–'} |")
    lines += [
        "",
        "Refused, each for an architecture like it:",
        "",
        "| `model_type` | what the import says |",
        "|---|---|",
    ]
    lines += [f"| {family} | {refusal(models / family)} |" for family in REFUSED]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the table to docs/models.md."""
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    with tempfile.TemporaryDirectory() as scratch:
        for family, settings in {**SUPPORTED, **REFUSED}.items():
            make_family(family, settings, Path(scratch, family))
        TABLE.write_text(before + BEGIN + table(Path(scratch)) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
