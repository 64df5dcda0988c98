"""A causal language model cut in two: lower layers that are frozen and shared, upper layers that are trained.

The reference policy, the policy and the reward model stand on the same lower layers. So these run once for all three,
and the backward pass ends above them. With no frozen layers, all layers are trained. Token embeddings and the output
embedding are never trained.

The weights of the lower layers are kept in the precision that they compute in (training.models.device). Trained weights
are kept in fp32 and compute in that precision by autocast. They are the upper layers themselves, or low-rank adapters
on them (Hu et al. 2021, LoRA). Shapes: see training.data.groups. D is the width of the hidden state.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from policies.artifact import MANIFEST
from policies.precision import compute_dtype
from training.config import LoraConfig
from training.data.groups import Group, PackedGroups, micro_batches, pack
from training.errors import TrainingError
from training.models.device import autocast, training_device
from training.models.logprobs import label_logprobs, label_logprobs_and_entropy
from training.models.parallel import ALONE, Ranks, shard, whole
from training.models.tensor_file import save_tensors

_WEIGHTS_FILE = "model.safetensors"
_ADAPTER = "default"
SCORING_TOKENS = 8192
"""Most tokens, padding included, in a forward pass without gradients."""


class ModelMismatchError(TrainingError):
    """Two models that should share their lower layers do not."""


def load_model(path: Path) -> PreTrainedModel:
    """Loads a model from a policy version's folder: frozen, without dropout, in the precision that it computes in."""
    device = training_device()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=compute_dtype(device), attn_implementation="sdpa", local_files_only=True, use_safetensors=True
    )
    model.requires_grad_(False)
    model.eval()
    on_device: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return on_device


class UpperLayers(nn.Module):
    """Layers `first` to `last` of a model and its final norm: the part of a policy that no other model shares."""

    def __init__(self, model: PreTrainedModel, first: int, last: int) -> None:
        super().__init__()
        body: Any = model.model
        self.first = first
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in body.layers[first:last])
        self.norm = copy.deepcopy(body.norm)
        self.checkpointing = False

    def forward(self, hidden_GTD: Tensor, packed: PackedGroups, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the normed hidden states that leave the last layer, from those that enter layer `first`."""
        hidden_GTD = run_layers(self.layers, hidden_GTD, packed, angles, checkpointing=self.checkpointing)
        normed_GTD: Tensor = self.norm(hidden_GTD)
        return normed_GTD

    def trainable(self, lora: LoraConfig, ranks: Ranks = ALONE) -> UpperLayers:
        """Makes these layers trainable, and returns them: all weights in fp32, or adapters on weights that stay frozen.

        Several ranks divide the weights. Adapters start at random and must be the same on all ranks: seed these alike.
        """
        if lora.rank:
            # peft takes seconds to import, and training full weights does not need it.
            from peft import LoraConfig as PeftLoraConfig
            from peft import inject_adapter_in_model

            found = [name for name, module in self.layers.named_modules() if isinstance(module, nn.Linear)]
            targets = sorted({name.rpartition(".")[2] for name in found})
            adapters = PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)  # type: ignore[arg-type]
            inject_adapter_in_model(adapters, self, adapter_name=_ADAPTER)
            # peft makes adapters in the type of the weights. In bf16 most steps would be too small to change a weight.
            for parameter in self.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        for layer in (*self.layers, self.norm):
            if not lora.rank:
                layer.float().requires_grad_(True)
            # One layer after the other: all of them, undivided and in fp32, may not fit the device.
            shard(ranks, self if layer is self.norm else layer)
        return self


def run_layers(
    layers: Any, hidden_GTD: Tensor, packed: PackedGroups, angles: tuple[Tensor, Tensor], *, checkpointing: bool = False
) -> Tensor:
    """Runs decoder layers, in order. `checkpointing` keeps only each layer's input, and computes the rest again."""
    for layer in layers:
        arguments: dict[str, Any] = {"attention_mask": packed.attends_GTT.unsqueeze(1), "position_embeddings": angles}
        if checkpointing:
            hidden_GTD = checkpoint(layer, hidden_GTD, use_reentrant=False, **arguments)
        else:
            hidden_GTD = layer(hidden_GTD, **arguments)
    return hidden_GTD


class SharedLayers:
    """The reference policy's embeddings and layers, frozen: they run once for all models that stand on them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._body: Any = model.model

    @property
    def device(self) -> torch.device:
        """The device on which everything is computed."""
        return self.head_VD.device

    @property
    def num_layers(self) -> int:
        """The number of layers of the whole model."""
        return len(self._body.layers)

    def shard(self, ranks: Ranks) -> None:
        """Divides the layers, not the embeddings, among the ranks. From then on each forward pass is a collective."""
        shard(ranks, *self._body.layers)

    @property
    def head_VD(self) -> Tensor:
        """The output embedding."""
        head: Any = self.model.get_output_embeddings()
        return head.weight  # type: ignore[no-any-return]

    def angles(self, packed: PackedGroups) -> tuple[Tensor, Tensor]:
        """Returns the rotary position embedding, the same for every layer."""
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


def completion_logprobs(hidden_GTD: Tensor, head_VD: Tensor, packed: PackedGroups) -> Tensor:
    """Returns each completion token's log-probability, [N, C], 0 beyond the ends. Gradients reach the hidden states."""
    hidden_MD, labels_M = _predicting(hidden_GTD, packed)
    return _on_mask(packed.mask_NC, label_logprobs(hidden_MD, head_VD, labels_M))


def completion_logprobs_and_entropy(hidden_GTD: Tensor, head_VD: Tensor, packed: PackedGroups) -> tuple[Tensor, Tensor]:
    """Returns the same log-probabilities, without gradients, and the entropy where each token was drawn, [N, C] too."""
    hidden_MD, labels_M = _predicting(hidden_GTD, packed)
    logprobs_M, entropy_M = label_logprobs_and_entropy(hidden_MD, head_VD, labels_M)
    return _on_mask(packed.mask_NC, logprobs_M), _on_mask(packed.mask_NC, entropy_M)


@torch.no_grad()
def reference_logprobs(shared: SharedLayers, groups: Sequence[Group]) -> list[float]:
    """Returns each completion's log-probability under the reference policy, in nats, in the order of the groups."""
    norm = UpperLayers(shared.model, shared.num_layers, shared.num_layers)
    found: dict[int, list[float]] = {}
    for batch in micro_batches([len(group) for group in groups], SCORING_TOKENS):
        packed = pack([groups[index] for index in batch]).to(shared.device)
        hidden_GTD = shared.encode(packed, [shared.num_layers])[shared.num_layers]
        with autocast(shared.device):
            normed_GTD = norm(hidden_GTD, packed, shared.angles(packed))
        logprobs_NC = completion_logprobs(normed_GTD, shared.head_VD, packed)
        found.update(zip(batch, (each.tolist() for each in logprobs_NC.sum(1).split(packed.group_sizes)), strict=True))
    return [logprob for index in range(len(groups)) for logprob in found[index]]


def _predicting(hidden_GTD: Tensor, packed: PackedGroups) -> tuple[Tensor, Tensor]:
    """Returns the hidden states [M, D] that predict the completions' tokens, and these [M]; only they need logits."""
    return hidden_GTD.flatten(0, 1)[packed.before_NC[packed.mask_NC]], packed.labels_NC[packed.mask_NC]


def _on_mask(mask_NC: Tensor, values_M: Tensor) -> Tensor:
    return torch.zeros(mask_NC.shape, device=values_M.device).masked_scatter(mask_NC, values_M)


def upper_layers_of(
    path: Path, shared: SharedLayers, first: int, lora: LoraConfig, ranks: Ranks = ALONE
) -> UpperLayers:
    """Loads the upper layers of the version at `path`, trainable, and divided where there are several ranks.

    Raises:
        ModelMismatchError: the weights below these layers differ from the reference policy's, so cannot be shared.
    """
    model = load_model(path)
    upper = UpperLayers(model, first, shared.num_layers)
    owned = {name for name, _ in tensors_of(upper)}
    reference = shared.model.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in owned and not torch.equal(tensor, reference[name]):
            raise ModelMismatchError(
                f"{path}: {name} differs from the reference policy's; freeze fewer layers than {first}"
            )
    del model
    return upper.trainable(lora, ranks)


def tensors_of(upper: UpperLayers) -> Iterator[tuple[str, Tensor]]:
    """Yields the upper layers' tensors by the names that they have in the whole model, adapters merged into them."""
    for name, tensor in upper.norm.named_parameters():
        yield f"model.norm.{name}", tensor
    for index, layer in enumerate(upper.layers, start=upper.first):
        for name, tensor in _merged(layer):
            yield f"model.layers.{index}.{name}", tensor


def _merged(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    adapted: dict[str, Any] = {name: each for name, each in layer.named_modules() if hasattr(each, "get_delta_weight")}
    for name, module in adapted.items():
        yield f"{name}.weight", module.get_base_layer().weight.float() + module.get_delta_weight(_ADAPTER)
    for name, tensor in layer.named_parameters():
        if not any(name.startswith(f"{each}.") for each in adapted):
            yield name, tensor


def merged_tensors(
    shared: SharedLayers, upper: UpperLayers, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Tensor]]:
    """Yields the whole policy by the names of its checkpoint, in bf16 as it is saved, or in `dtype` for an engine.

    It yields one tensor at a time, so that no device ever has all of them. It is a collective if weights are in shards:
    every rank gets all tensors, and must take all of them.
    """
    trained = ("model.norm.", *(f"model.layers.{upper.first + index}." for index in range(len(upper.layers))))
    tied = ("lm_head.",) if shared.model.config.tie_word_embeddings else ()
    frozen = (each for each in shared.model.state_dict().items() if not each[0].startswith((*trained, *tied)))
    for name, tensor in itertools.chain(frozen, tensors_of(upper)):
        yield name, whole(tensor.detach().to(dtype))


def merged_weights(shared: SharedLayers, upper: UpperLayers, *, kept: bool = True) -> dict[str, Tensor]:
    """Returns the whole policy in bf16, on the host. A rank without `kept` takes part and gets nothing."""
    return {name: tensor.cpu() for name, tensor in merged_tensors(shared, upper) if kept}


def save_policy(folder: Path, shared: SharedLayers, upper: UpperLayers, source: Path) -> None:
    """Writes the policy's weights, and copies the tokenizer and configuration from the version at `source`."""
    save_weights(folder, merged_weights(shared, upper), source)


def save_weights(folder: Path, weights: Mapping[str, Tensor], source: Path) -> None:
    """Writes weights that `merged_weights` has returned, and copies the other files from the version at `source`."""
    _copy_settings(source, folder)
    save_tensors(folder / _WEIGHTS_FILE, weights, {"format": "pt"})


def _copy_settings(source: Path, folder: Path) -> None:
    """Copies a version's tokenizer and configuration: all its files except weights and manifest."""
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != MANIFEST:
            (folder / file.name).write_bytes(file.read_bytes())


def load_weights(path: Path) -> dict[str, Tensor]:
    """Loads a version's tensors."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
