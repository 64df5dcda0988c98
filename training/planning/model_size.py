"""Measures a model from its config.json alone: its parameters, part by part, and what a forward pass costs.

The model is built without memory (on torch's meta device), so the counts are those of the code that will run it.
T is the number of tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "config.json"


class UnknownModelError(ValueError):
    """A run with this model cannot be planned; the message says why."""


@dataclass(frozen=True)
class ModelSize:
    """Parameters by part, and the widths on which the cost of a pass depends."""

    name: str
    num_layers: int
    embedding: int
    """Parameters of the token embedding."""
    layer: int
    """Parameters of one layer."""
    norm: int
    """Parameters of the final norm."""
    head: int
    """Parameters of the output embedding; 0 where it is the token embedding."""
    layer_matrices: int
    """Parameters of one layer's matrices, which each token is multiplied by."""
    linear_widths: int
    """Sum of inputs and outputs of a layer's matrices: the number of parameters of LoRA adapters of rank 1."""
    hidden: int
    vocabulary: int
    intermediate: int
    attention: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together; that of all value heads is the same."""
    num_heads: int
    head_width: int
    max_positions: int
    normed: int
    """Numbers of a token that a layer's norms read: twice the hidden state in Llama's."""
    soft_capped: bool = False
    """Whether logits have a soft cap, those of attention too: with a mask of all pairs, these are then kept."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.num_layers * self.layer + self.norm + self.head

    @property
    def read_per_token(self) -> int:
        """Parameters read to predict a token: all, except that only one row of the token embedding is looked up."""
        return self.total - (self.embedding if self.head else 0)

    @property
    def cache_width(self) -> int:
        """Numbers in the KV cache for one token."""
        return 2 * self.num_layers * self.key_value

    def weight_flops(self, tokens: float, num_layers: int) -> float:
        """Returns the FLOPs of multiplying tokens once by the matrices of `num_layers` layers."""
        return 2.0 * tokens * num_layers * self.layer_matrices

    def attention_flops(self, tokens: float, context: float, num_layers: int) -> float:
        """Returns the FLOPs of q·kᵀ and of its product with v, where every token attends to `context` tokens.

        What a mask then hides is computed too, and counts.
        """
        return 4.0 * tokens * context * self.attention * num_layers

    def forward_flops(self, tokens: float, context: float, num_layers: int) -> float:
        """Returns the FLOPs of a forward pass through some layers, where every token attends to `context` tokens.

        Only matrix products count.
        """
        return self.weight_flops(tokens, num_layers) + self.attention_flops(tokens, context, num_layers)

    def head_flops(self, tokens: float) -> float:
        """Returns the FLOPs of the logits of `tokens` tokens."""
        return 2.0 * tokens * self.hidden * self.vocabulary


def read_model(path: Path) -> ModelSize:
    """Measures the model of a folder's config.json, or of the file itself. No weights are read.

    Raises:
        UnknownModelError: there is no such file, or the model is not built as the trainer needs it, or its layers are
            not all alike.
    """
    file = path / CONFIG_FILE if path.is_dir() else path
    if not file.is_file():
        raise UnknownModelError(f"there is no {CONFIG_FILE} at {path}")
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return _measure(model, config)
    except UnknownModelError:
        raise
    except Exception as error:
        # Any error: it depends on the contents of the user's file which one transformers raises.
        raise UnknownModelError(f"{file}: {error}") from error


def _measure(model: PreTrainedModel, config: Any) -> ModelSize:
    from training.models.anatomy import parts_of

    parts = parts_of(model)
    if len({_count(layer) for layer in parts.layers}) > 1:
        raise ValueError("its layers are not all alike")
    matrices = [each for each in parts.layers[0].modules() if isinstance(each, nn.Linear)]
    head: Any = model.get_output_embeddings()
    tied = config.tie_word_embeddings
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_attention_heads * head_width
    key_value = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_width
    # Some layers also norm the queries and keys of all heads.
    others = {"q": attention, "k": key_value}
    norms = [name for name, each in parts.layers[0].named_modules() if type(each).__name__.endswith("Norm")]
    return ModelSize(
        name=config.model_type,
        num_layers=len(parts.layers),
        embedding=_count(model.get_input_embeddings()),
        layer=_count(parts.layers[0]),
        norm=_count(parts.norm),
        head=0 if tied else _count(head),
        layer_matrices=sum(each.weight.numel() for each in matrices),
        linear_widths=sum(each.in_features + each.out_features for each in matrices),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        intermediate=config.intermediate_size,
        attention=attention,
        key_value=key_value,
        num_heads=config.num_attention_heads,
        head_width=head_width,
        max_positions=config.max_position_embeddings,
        normed=sum(others.get(name.rpartition(".")[2][:1], config.hidden_size) for name in norms),
        soft_capped=bool(getattr(config, "attn_logit_softcapping", None)),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
