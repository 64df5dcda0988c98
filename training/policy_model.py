"""A causal language model cut in two: lower layers that are frozen and shared, upper layers that are trained.

The reference policy, the policy and the reward model stand on the same lower layers, so these are run once for all
three, and the backward pass ends above them. With no frozen layers, all are trained. Token embeddings and output
embedding always stay as they are.

The lower layers compute in bf16. What is trained is kept in fp32 and computes in bf16 by autocast.
Shapes: see training.groups. D is the width of the hidden state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from training.groups import PackedGroups
from training.logprobs import label_logprobs

WEIGHTS_FILE = "model.safetensors"


class ModelMismatchError(ValueError):
    """Two models that should share their lower layers do not."""


def load_model(path: Path) -> PreTrainedModel:
    """Loads a bf16 model from a policy version's folder, frozen, without dropout."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
    )
    model.requires_grad_(False)
    model.eval()
    return model


class UpperLayers(nn.Module):
    """Layers `first` to `last` of a model and its final norm: what a policy or reward model has of its own."""

    def __init__(self, model: PreTrainedModel, first: int, last: int) -> None:
        super().__init__()
        body: Any = model.model
        self.first = first
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in body.layers[first:last])
        self.norm = copy.deepcopy(body.norm)

    def forward(self, hidden_GTD: Tensor, packed: PackedGroups, angles: tuple[Tensor, Tensor]) -> Tensor:
        """From the hidden states that enter the first of these layers to the normed ones that leave the last."""
        hidden_GTD = run_layers(self.layers, hidden_GTD, packed, angles)
        normed_GTD: Tensor = self.norm(hidden_GTD)
        return normed_GTD

    def trainable(self) -> UpperLayers:
        """These layers, in fp32 and with gradients."""
        return self.float().requires_grad_(True)


def run_layers(layers: Any, hidden_GTD: Tensor, packed: PackedGroups, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Runs decoder layers, in order."""
    for layer in layers:
        hidden_GTD = layer(hidden_GTD, attention_mask=packed.attends_GTT.unsqueeze(1), position_embeddings=angles)
    return hidden_GTD


class SharedLayers:
    """The reference policy's embeddings and layers, frozen: they run once, for all that stands on them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._body: Any = model.model

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self._body.layers)

    @property
    def head_VD(self) -> Tensor:
        """The output embedding."""
        head: Any = self.model.get_output_embeddings()
        return head.weight  # type: ignore[no-any-return]

    def angles(self, packed: PackedGroups) -> tuple[Tensor, Tensor]:
        """The rotary position embedding, for every layer."""
        angles: tuple[Tensor, Tensor] = self._body.rotary_emb(self.head_VD, packed.positions_GT)
        return angles

    @torch.no_grad()
    def encode(self, packed: PackedGroups, levels: Sequence[int]) -> dict[int, Tensor]:
        """Returns the hidden states that enter each layer of `levels`, [G, T, D] each."""
        angles = self.angles(packed)
        hidden_GTD, below, encoded = self._body.embed_tokens(packed.tokens_GT), 0, {}
        for level in sorted(set(levels)):
            hidden_GTD = run_layers(self._body.layers[below:level], hidden_GTD, packed, angles)
            encoded[level], below = hidden_GTD, level
        return encoded


def completion_logprobs(hidden_GTD: Tensor, head_VD: Tensor, packed: PackedGroups) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion token and entropy where it was drawn, both [N, C], 0 beyond the ends."""
    hidden_MD = hidden_GTD.flatten(0, 1)[packed.before_NC[packed.mask_NC]]
    logprobs_M, entropy_M = label_logprobs(hidden_MD, head_VD, packed.labels_NC[packed.mask_NC])
    blank_NC = torch.zeros(packed.mask_NC.shape)
    return blank_NC.masked_scatter(packed.mask_NC, logprobs_M), blank_NC.masked_scatter(packed.mask_NC, entropy_M)


def upper_layers_of(path: Path, shared: SharedLayers, first: int) -> UpperLayers:
    """Loads the upper layers of the version at `path`, to be trained.

    Raises ModelMismatchError if what lies below differs from the reference's, since that could not be shared.
    """
    model = load_model(path)
    upper = UpperLayers(model, first, shared.num_layers)
    owned = {name for name, _ in tensors_of(upper)}
    reference = shared.model.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in owned and not torch.equal(tensor, reference[name]):
            raise ModelMismatchError(f"{path}: {name} is not the reference policy's; freeze fewer layers than {first}")
    return upper.trainable()


def tensors_of(upper: UpperLayers) -> Iterator[tuple[str, Tensor]]:
    """The upper layers' tensors by the names that they have in the whole model."""
    for name, tensor in upper.norm.named_parameters():
        yield f"model.norm.{name}", tensor
    for index, layer in enumerate(upper.layers, start=upper.first):
        for name, tensor in layer.named_parameters():
            yield f"model.layers.{index}.{name}", tensor


def merged_weights(shared: SharedLayers, upper: UpperLayers) -> dict[str, Tensor]:
    """The whole policy in bf16, by the names of its checkpoint, ready to be saved or given to an engine."""
    weights = dict(shared.model.state_dict())
    if shared.model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    weights.update((name, tensor.detach().to(torch.bfloat16)) for name, tensor in tensors_of(upper))
    return weights


def save_policy(folder: Path, shared: SharedLayers, upper: UpperLayers, source: Path) -> None:
    """Writes the policy's weights, and copies from `source` all that a version holds besides."""
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "manifest.json":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = {name: tensor.contiguous() for name, tensor in merged_weights(shared, upper).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_weights(path: Path) -> dict[str, Tensor]:
    """Loads a version's tensors."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
