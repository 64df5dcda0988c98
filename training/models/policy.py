"""A causal language model cut in two: lower layers that are frozen and shared, upper layers that are trained.

The reference policy, the policy and the reward model stand on the same lower layers. So these run once for all three,
and the backward pass ends above them. With no frozen layers, all layers are trained. Token embeddings and the output
embedding are never trained.

All weights are kept in the precision that they compute in (training.models.device), and trained weights also in fp32
(training.models.masters). These are the upper layers themselves, or low-rank adapters on them (Hu et al. 2021, LoRA).
Shapes: see training.data.groups. D is the width of the hidden state.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import set_tqdm_hook

from feedback import heartbeat
from policies.artifact import MANIFEST
from policies.precision import compute_dtype
from policies.weights import MAX_SHARD_BYTES
from training.config import LoraConfig
from training.data.groups import Group, PackedGroups, micro_batches, pack
from training.errors import TrainingError
from training.models.anatomy import Angles, Entry, attention_for, head_of, parts_of
from training.models.device import autocast, training_device
from training.models.logprobs import Head, label_logprobs, label_logprobs_and_entropy
from training.models.masters import keep_masters, rounded
from training.models.parallel import ALONE, Ranks, shard, whole
from training.models.tensor_file import save_model_tensors

_ADAPTER = "default"
SCORING_TOKENS = 2048
"""Most tokens, padding included, in a forward pass without gradients."""


class ModelMismatchError(TrainingError):
    """Two models that should share their lower layers do not."""


def load_model(path: Path) -> PreTrainedModel:
    """Loads a model from a policy version's folder: frozen, without dropout, in the precision that it computes in."""
    device = training_device()
    set_tqdm_hook(_beating)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=compute_dtype(device), local_files_only=True, use_safetensors=True,
        attn_implementation=attention_for(AutoConfig.from_pretrained(path, local_files_only=True), device),
    )  # fmt: skip
    model.requires_grad_(False)
    model.eval()
    on_device: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return on_device


def _beating(bar: Any, items: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Makes transformers' progress bar, by which it reads a model's tensors, also show that there is progress."""
    return bar(*map(heartbeat.each, items[:1]), *items[1:], **options)


class UpperLayers(nn.Module):
    """Layers `first` to `last` of a model and its final norm: the part of a policy that no other model shares.

    They are copies, unless the model's own are asked for.
    """

    def __init__(self, model: PreTrainedModel, first: int, last: int, *, copies: bool = True) -> None:
        super().__init__()
        parts = parts_of(model)
        self.first = first
        self.layers = nn.ModuleList(copy.deepcopy(each) if copies else each for each in parts.layers[first:last])
        self.norm = copy.deepcopy(parts.norm)
        self.layers_name, self.norm_name = parts.layers_name, parts.norm_name
        self.checkpointing = False

    def forward(self, hidden_GTD: Tensor, packed: PackedGroups, angles: Angles) -> Tensor:
        """Returns the normed hidden states that leave the last layer, from those that enter layer `first`."""
        hidden_GTD = run_layers(self.layers, hidden_GTD, packed, angles, self.first, checkpointing=self.checkpointing)
        normed_GTD: Tensor = self.norm(hidden_GTD)
        return normed_GTD

    def trainable(self, lora: LoraConfig, ranks: Ranks = ALONE, dtype: torch.dtype = torch.float32) -> UpperLayers:
        """Makes these layers trainable, and returns them: all weights, or adapters on weights that stay frozen.

        What is trained computes in `dtype`, and has masters in fp32 if that is another. Several ranks divide the
        weights. Adapters start at random and must be the same on all ranks: seed these alike.
        """
        # FSDP leaves gradients in the type of the weights that it divides, and they must add up in fp32.
        stored = torch.float32 if ranks.size > 1 else dtype
        if lora.rank:
            # peft takes seconds to import, and training full weights does not need it.
            from peft import LoraConfig as PeftLoraConfig
            from peft import inject_adapter_in_model

            found = [name for name, module in self.layers.named_modules() if isinstance(module, nn.Linear)]
            targets = sorted({name.rpartition(".")[2] for name in found})
            adapters = PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)  # type: ignore[arg-type]
            inject_adapter_in_model(adapters, self, adapter_name=_ADAPTER)
            for parameter in self.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(stored)
        for layer in (*self.layers, self.norm):
            if not lora.rank:
                layer.to(stored).requires_grad_(True)
            # One layer after the other: all of them, undivided, may not fit the device.
            shard(ranks, self if layer is self.norm else layer, dtype=dtype)
        if dtype != torch.float32:
            keep_masters(self)
        return self


def run_layers(
    layers: Any, hidden_GTD: Tensor, packed: PackedGroups, angles: Angles, first: int, *, checkpointing: bool = False
) -> Tensor:
    """Runs decoder layers, in order, the first of which is the model's layer `first`.

    `checkpointing` keeps only each layer's input, and computes the rest again.
    """
    last = first + len(layers)
    masks, given = angles.masks(packed, first, last, hidden_GTD), angles.arguments[first:last]
    for layer, mask, others in zip(layers, masks, given, strict=True):
        arguments = {**others, "attention_mask": mask}
        if checkpointing:
            hidden_GTD = checkpoint(layer, hidden_GTD, use_reentrant=False, **arguments)
        else:
            hidden_GTD = layer(hidden_GTD, **arguments)
    return hidden_GTD


class SharedLayers:
    """The reference policy's embeddings and layers, frozen: they run once for all models that stand on them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parts = parts_of(model)
        self._entry = Entry(model)

    @property
    def device(self) -> torch.device:
        """The device on which everything is computed."""
        return self.head_VD.device

    @property
    def num_layers(self) -> int:
        """The number of layers of the whole model."""
        return len(self.parts.layers)

    def shard(self, ranks: Ranks) -> None:
        """Divides the layers, not the embeddings, among the ranks. From then on each forward pass is a collective."""
        shard(ranks, *self.parts.layers)

    @property
    def head(self) -> Head:
        """The output embedding, and how the model makes logits by it."""
        return head_of(self.model)

    @property
    def head_VD(self) -> Tensor:
        """The weights of the output embedding."""
        return self.head.weight_VD

    @torch.no_grad()
    def angles(self, packed: PackedGroups) -> Angles:
        """Returns what each layer is given besides hidden states, such as the rotary position embedding."""
        return self._entry.enter(packed)[1]

    @torch.no_grad()
    def encode(self, packed: PackedGroups, levels: Sequence[int]) -> dict[int, Tensor]:
        """Returns the hidden states that enter each layer of `levels`, [G, T, D] each."""
        heartbeat.beat()
        hidden_GTD, angles = self._entry.enter(packed)
        below, encoded = 0, {}
        for level in sorted(set(levels)):
            hidden_GTD = run_layers(self.parts.layers[below:level], hidden_GTD, packed, angles, below)
            encoded[level], below = hidden_GTD, level
        return encoded


def completion_logprobs(hidden_GTD: Tensor, head: Head, packed: PackedGroups) -> Tensor:
    """Returns each completion token's log-probability, [N, C], 0 beyond the ends. Gradients reach the hidden states."""
    hidden_MD, labels_M = _predicting(hidden_GTD, packed)
    return _on_mask(packed.mask_NC, label_logprobs(hidden_MD, head, labels_M))


def completion_logprobs_and_entropy(hidden_GTD: Tensor, head: Head, packed: PackedGroups) -> tuple[Tensor, Tensor]:
    """Returns the same log-probabilities, and the entropy where each token was drawn, [N, C] too, without gradients."""
    hidden_MD, labels_M = _predicting(hidden_GTD, packed)
    logprobs_M, entropy_M = label_logprobs_and_entropy(hidden_MD, head, labels_M)
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
        logprobs_NC = completion_logprobs(normed_GTD, shared.head, packed)
        found.update(zip(batch, (each.tolist() for each in logprobs_NC.sum(1).split(packed.group_sizes)), strict=True))
    return [logprob for index in range(len(groups)) for logprob in found[index]]


def _predicting(hidden_GTD: Tensor, packed: PackedGroups) -> tuple[Tensor, Tensor]:
    """Returns the hidden states [M, D] that predict the completions' tokens, and these [M]; only they need logits."""
    return hidden_GTD.flatten(0, 1)[packed.before_NC[packed.mask_NC]], packed.labels_NC[packed.mask_NC]


def _on_mask(mask_NC: Tensor, values_M: Tensor) -> Tensor:
    return torch.zeros(mask_NC.shape, device=values_M.device).masked_scatter(mask_NC, values_M)


def upper_layers_of(
    path: Path,
    shared: SharedLayers,
    first: int,
    lora: LoraConfig,
    ranks: Ranks = ALONE,
    dtype: torch.dtype = torch.float32,
) -> UpperLayers:
    """Loads the upper layers of the version at `path`, trainable in `dtype`, and divided where there are several ranks.

    Raises:
        ModelMismatchError: the weights below these layers differ from the reference policy's, so cannot be shared.
    """
    model = load_model(path)
    upper = UpperLayers(model, first, shared.num_layers)
    owned = {name for name, _ in tensors_of(upper)}
    reference = shared.model.state_dict()
    for name, tensor in heartbeat.each(model.state_dict().items()):
        if name not in owned and not torch.equal(tensor, reference[name]):
            raise ModelMismatchError(
                f"{path}: {name} differs from the reference policy's; freeze fewer layers than {first}"
            )
    del model
    return upper.trainable(lora, ranks, dtype)


def tensors_of(upper: UpperLayers) -> Iterator[tuple[str, Tensor]]:
    """Yields the upper layers' tensors by the names that they have in the whole model, adapters merged into them."""
    for name, tensor in upper.norm.named_parameters():
        yield f"{upper.norm_name}{name}", tensor
    for index, layer in enumerate(upper.layers, start=upper.first):
        for name, merged in _merged(layer):
            yield f"{upper.layers_name}{index}.{name}", merged


def _merged(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    adapted: dict[str, Any] = {name: each for name, each in layer.named_modules() if hasattr(each, "get_delta_weight")}
    for name, module in adapted.items():
        base = module.get_base_layer()
        yield f"{name}.weight", base.weight.float() + module.get_delta_weight(_ADAPTER)
        if base.bias is not None:
            yield f"{name}.bias", base.bias
    for name, tensor in layer.named_parameters():
        if not any(name.startswith(f"{each}.") for each in adapted):
            yield name, tensor


def merged_tensors(
    shared: SharedLayers, upper: UpperLayers, dtype: torch.dtype = torch.bfloat16, noise: torch.Generator | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields the whole policy by the names of its checkpoint, in bf16 as it is saved, or in `dtype` for an engine.

    With `noise`, weights in fp32 are rounded at random. To the nearest, most of what adapters have learned at first
    would be lost: it is small beside the weights that it is merged into.

    It yields one tensor at a time, so that no device ever has all of them. It is a collective if weights are in shards:
    every rank gets all tensors, and must take all of them.
    """
    names = shared.parts
    trained = (names.norm_name, *(f"{names.layers_name}{upper.first + index}." for index in range(len(upper.layers))))
    tied = (names.head_name,) if shared.model.config.tie_word_embeddings else ()
    frozen = (each for each in shared.model.state_dict().items() if not each[0].startswith((*trained, *tied)))
    for name, tensor in heartbeat.each(itertools.chain(frozen, tensors_of(upper))):
        if noise and tensor.dtype == torch.float32 and dtype == torch.bfloat16:
            yield names.saved_name(name), rounded(whole(tensor.detach()), noise)
        else:
            yield names.saved_name(name), whole(tensor.detach().to(dtype))


def merged_weights(
    shared: SharedLayers, upper: UpperLayers, *, noise: torch.Generator | None = None, kept: bool = True
) -> dict[str, Tensor]:
    """Returns the whole policy in bf16, on the host. A rank without `kept` takes part and gets nothing."""
    return {name: tensor.cpu() for name, tensor in merged_tensors(shared, upper, noise=noise) if kept}


def save_policy(
    folder: Path, shared: SharedLayers, upper: UpperLayers, source: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes the policy's weights, and copies the tokenizer and configuration from the version at `source`."""
    save_weights(folder, merged_weights(shared, upper), source, max_shard_bytes)


def save_weights(
    folder: Path, weights: Mapping[str, Tensor], source: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes weights that `merged_weights` has returned, and copies the other files from the version at `source`.

    Weights larger than `max_shard_bytes` are written as several files, with an index.
    """
    _copy_settings(source, folder)
    save_model_tensors(folder, weights, max_shard_bytes)


def _copy_settings(source: Path, folder: Path) -> None:
    """Copies a version's tokenizer and configuration: all its files except manifest, weights and their index."""
    for file in source.iterdir():
        of_weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
        if file.is_file() and not of_weights and file.name != MANIFEST:
            (folder / file.name).write_bytes(file.read_bytes())
