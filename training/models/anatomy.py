"""Reads from a model of transformers what the trainer must know of its architecture, to run its layers by itself.

Little of it is said by name. What a layer is given besides hidden states and mask, and which hidden states enter the
first layer, is learned from the model's own forward pass: it is run with each layer replaced by one that only notes its
arguments. So scaled embeddings and rotations that differ from layer to layer are right without being known here.
Whether all is right, training.models.trial tries. Shapes: see training.data.groups.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from training.data.groups import PackedGroups
from training.models.attention import IN_PARTS, Layout, in_parts
from training.models.logprobs import Head

_LAYERS = "layers"
_NORMS = ("norm", "final_layernorm", "final_layer_norm")
# Implementations of attention, as transformers calls them. The first is faster, and leaves out soft caps.
_FUSED, _PLAIN = "sdpa", "eager"


def attention_of(path: Path) -> str:
    """Returns transformers' own implementation of attention that computes all that a folder's model does to it."""
    return _masked(AutoConfig.from_pretrained(path, local_files_only=True))


def attention_for(config: Any, device: torch.device) -> str:
    """Returns the implementation for packed rows on a device, for a model's configuration."""
    return IN_PARTS if in_parts(device) else _masked(config)


def _masked(config: Any) -> str:
    return _PLAIN if getattr(config, "attn_logit_softcapping", None) else _FUSED


@dataclass(frozen=True)
class Parts:
    """A model's parts, and how the names of their tensors begin."""

    body: Any
    """The model without its output embedding."""
    layers: nn.ModuleList
    norm: nn.Module
    """The norm above the last layer."""
    layers_name: str
    norm_name: str
    head_name: str
    renamings: tuple[Any, ...]
    """From names of the model's code to names of its files, where transformers renamed tensors as it loaded them."""

    def saved_name(self, name: str) -> str:
        """Returns the name that a tensor of the model has in the files that the model came from."""
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return name


def parts_of(model: PreTrainedModel) -> Parts:
    """Finds the parts of a model.

    Raises:
        NotImplementedError: the model is not an embedding, a list of layers, a norm and an output embedding; or its
            files hold other tensors than its code.
    """
    body: Any = model.base_model
    layers = getattr(body, _LAYERS, None)
    norms = [name for name in _NORMS if hasattr(body, name)]
    if not isinstance(layers, nn.ModuleList) or len(norms) != 1:
        raise NotImplementedError("it is not built as a list of layers with one norm above them")
    # Not every model was loaded from files.
    changes = list(getattr(model, "_weight_conversions", None) or ())
    if _has_experts(layers) or not all(isinstance(change, WeightRenaming) for change in changes):
        raise NotImplementedError("its code has the tensors of experts joined, which its files have apart")
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    if len(heads) != 1:
        raise NotImplementedError("it has no output embedding of its own")
    prefix = model.base_model_prefix
    return Parts(
        body=body,
        layers=layers,
        norm=getattr(body, norms[0]),
        layers_name=f"{prefix}.{_LAYERS}.",
        norm_name=f"{prefix}.{norms[0]}.",
        head_name=f"{heads[0]}.",
        renamings=tuple(change.reverse_transform() for change in reversed(changes)),
    )


def _has_experts(layers: nn.ModuleList) -> bool:
    return any(parameter.ndim > 2 for parameter in layers.parameters())


def head_of(model: PreTrainedModel) -> Head:
    """Returns a model's output embedding, and what the model does to the logits."""
    module: Any = model.get_output_embeddings()
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    return Head(
        weight_VD=module.weight,
        bias_V=getattr(module, "bias", None),
        scale=scale / (getattr(config, "logits_scaling", None) or 1.0),
        cap=getattr(config, "final_logit_softcapping", None),
    )


@dataclass(frozen=True)
class Angles:
    """What each layer is given besides hidden states: rotary position embeddings above all, and how far it looks back.

    Layers of a kind share the same tensors.
    """

    arguments: tuple[Mapping[str, Any], ...]
    windows: tuple[int | None, ...]
    """How many positions each layer looks back, its own included; None: all."""
    attention: str
    """The implementation of attention, as transformers calls it."""

    def masks(self, packed: PackedGroups, first: int, last: int, like: Tensor) -> list[Tensor | Layout]:
        """Returns how rows attend in each layer from `first` to `last`, for hidden states `like`.

        It is a mask, [G, 1, T, T], unless attention is in parts.
        """
        windows = self.windows[first:last]
        made = {window: self._mask(packed, window, like) for window in set(windows)}
        return [made[window] for window in windows]

    def _mask(self, packed: PackedGroups, window: int | None, like: Tensor) -> Tensor | Layout:
        if self.attention == IN_PARTS:
            return Layout(packed.spans, window)
        attends_GTT = packed.attends()
        if window is not None:
            # By positions, not by places: those of each completion begin after the prompt's.
            back_GTT = packed.positions_GT[:, :, None] - packed.positions_GT[:, None, :]
            attends_GTT = attends_GTT & (back_GTT < window)
        mask_GHTT = attends_GTT.unsqueeze(1)
        if self.attention != _PLAIN:
            return mask_GHTT
        return like.new_zeros(mask_GHTT.shape).masked_fill(~mask_GHTT, torch.finfo(like.dtype).min)


def windows_of(config: Any) -> tuple[int | None, ...]:
    """Returns how many positions each layer looks back, its own included; None: all.

    Raises:
        NotImplementedError: a layer attends to something else than all or the last positions before it.
    """
    num_layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return (window,) * num_layers
    known = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(kinds) - known.keys())
    if unknown:
        raise NotImplementedError(f"its layers are of kind {', '.join(unknown)}")
    return tuple(known[kind] for kind in kinds)


def _check_rotation(config: Any) -> None:
    """Checks that rotary position embeddings follow from positions alone.

    Raises:
        NotImplementedError: they do not.
    """
    said = getattr(config, "rope_parameters", None) or {}
    kinds = [each.get("rope_type") for each in (said, *said.values()) if isinstance(each, dict)]
    if "dynamic" in kinds:
        # transformers scales by the longest sequence of a batch, vLLM by the most positions.
        raise NotImplementedError('its rotary position embedding is of type "dynamic", which vLLM computes otherwise')


class Entry:
    """A model's forward pass as far as its first layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        parts = parts_of(model)
        _check_rotation(model.config)
        self._config: Any = model.config
        self._windows = windows_of(model.config)
        self._given: list[tuple[Tensor, Mapping[str, Any]]] = []
        # It has the same embeddings and buffers as the model; the model stays as it is.
        self._body = copy.copy(parts.body)
        noted = nn.ModuleList(_Noted(layer, self._given) for layer in parts.layers)
        self._body._modules = {**parts.body._modules, _LAYERS: noted}

    def enter(self, packed: PackedGroups) -> tuple[Tensor, Angles]:
        """Returns the hidden states that enter the first layer, [G, T, D], and what each layer is given."""
        # Not by __call__, which vLLM, if it serves the class by transformers' code, has replaced in this process.
        self._body.forward(
            input_ids=packed.tokens_GT,
            position_ids=packed.positions_GT,
            # It only keeps the model from making one: a mask of four axes is taken as it is.
            attention_mask=packed.segments_GT[:, None, None],
            use_cache=False,
        )
        entered_GTD, _ = self._given[0]
        arguments = tuple(arguments for _, arguments in self._given)
        self._given.clear()
        return entered_GTD, Angles(arguments, self._windows, self._config._attn_implementation)


class _Noted(nn.Module):
    """Stands in for a layer: notes what it is given, and returns the hidden states as they are."""

    def __init__(self, layer: nn.Module, given: list[tuple[Tensor, Mapping[str, Any]]]) -> None:
        super().__init__()
        # In a tuple, so that torch does not take it for a part of this module.
        self._layer, self._given = (layer,), given

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_GTD: Tensor, **arguments: Any) -> Tensor:
        others = {name: value for name, value in arguments.items() if name != "attention_mask"}
        self._given.append((hidden_GTD, others))
        return hidden_GTD
