"""Attention over packed rows in parts: a prompt attends to itself, and each completion to its prompt and itself.

Most of a row's tokens do not see each other, so a kernel that takes a mask of all pairs computes most of them in vain.
Here only pairs that may attend are computed, except that the causal mask and windows hide some inside a part. The
backward pass computes the weights of attention again, so nothing of the size of the pairs is kept. A part is computed
in fp32, whatever its states are in: it is little work, and bf16 would lose the digits of logits. Padding is left out,
and gets zeros.

On a GPU a part is too little work for a kernel of its own, and a row's parts are many: there it is transformers' SDPA,
with a mask of all pairs. Both are what transformers calls an attention interface. What takes the place of the mask in
its call is the layout of the rows.

Shapes: see training.data.groups. H query heads, R heads of keys and values, E width of a head; in a part N queries of
one head of keys, and S tokens that they may see.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from training.data.groups import Span

IN_PARTS = "alignd_in_parts"
"""The name of this implementation among those of transformers."""
_MOST_QUERIES = 256
"""Tokens of a part. It bounds the memory of a part's logits, and few pairs of a part are hidden by the causal mask."""


@dataclass(frozen=True)
class Layout:
    """How rows attend: the spans of each, and how many positions a token looks back, its own included (None: all)."""

    rows: tuple[tuple[Span, ...], ...]
    window: int | None


def in_parts(device: torch.device) -> bool:
    """Whether models on this device attend in parts."""
    return device.type == "cpu"


@dataclass(frozen=True)
class _Part:
    """Queries `begin` to `end` of a row, and the two runs of tokens that they may see: `before`, and up to `end`."""

    begin: int
    end: int
    before: slice
    own: slice
    ahead: int
    """Place of the first query among what the part sees."""


def _parts(spans: Sequence[Span], window: int | None) -> Iterator[_Part]:
    for span in spans:
        for begin in range(span.begin, span.end, _MOST_QUERIES):
            end = min(begin + _MOST_QUERIES, span.end)
            # A token's position is its place in what its span sees: the first tokens of the row, then its own.
            position = span.seen + begin - span.begin
            first = 0 if window is None else max(0, position - window + 1)
            before = slice(min(first, span.seen), span.seen)
            own = slice(span.begin + max(0, first - span.seen), end)
            yield _Part(begin, end, before, own, position - first)


def _attend(
    module: nn.Module,
    query_GHTE: Tensor,
    key_GRTE: Tensor,
    value_GRTE: Tensor,
    attention_mask: Layout | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Does what transformers asks of an attention interface: returns the result, [G, T, H, E], and no weights.

    A model's own forward pass comes here too, with a mask, and is computed as its own code has it.

    Raises:
        NotImplementedError: attention has sinks.
    """
    if not isinstance(attention_mask, Layout):
        plain = sys.modules[type(module).__module__].eager_attention_forward
        capped = {"softcap": softcap} if softcap is not None else {}
        own: tuple[Tensor, Tensor | None] = plain(
            module, query_GHTE, key_GRTE, value_GRTE, attention_mask, scaling=scaling, **capped, **others
        )
        return own
    if others.get("s_aux") is not None:
        raise NotImplementedError("its attention has sinks")
    scale = query_GHTE.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotations and norms of queries and keys may leave them wider than values.
    query_GHTE, key_GRTE = query_GHTE.to(value_GRTE.dtype), key_GRTE.to(value_GRTE.dtype)
    attended: Tensor = _InParts.apply(  # type: ignore[no-untyped-call]
        query_GHTE, key_GRTE, value_GRTE, attention_mask, scale, softcap
    )
    return attended, None


AttentionInterface.register(IN_PARTS, _attend)
AttentionMaskInterface.register(IN_PARTS, eager_mask)


def _seen(tokens_RTE: Tensor, part: _Part) -> Tensor:
    """Returns the keys or values that a part sees, [R, S, E] in fp32."""
    own_RSE = tokens_RTE[:, part.own]
    if part.before.start == part.before.stop:
        return own_RSE.float()
    return torch.cat([tokens_RTE[:, part.before], own_RSE], 1).float()


def _add_seen(total_RTE: Tensor, part: _Part, added_RSE: Tensor) -> None:
    """Adds the gradients of what `_seen` returned."""
    num_before = part.before.stop - part.before.start
    total_RTE[:, part.before] += added_RSE[:, :num_before]
    total_RTE[:, part.own] += added_RSE[:, num_before:]


def _by_key_head(tokens_HNE: Tensor, num_key_heads: int) -> Tensor:
    """Lays queries that share a head of keys end to end, [R, N, E] in fp32."""
    return tokens_HNE.reshape(num_key_heads, -1, tokens_HNE.shape[-1]).float()


def _weights(
    query_RNE: Tensor, key_RSE: Tensor, part: _Part, window: int | None, scale: float, cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the weights of attention, [R, N, S], and by how much a soft cap flattens the logits' slopes."""
    logits_RNS = torch.bmm(query_RNE, key_RSE.mT).mul_(scale)
    flattened_RNS = None
    if cap is not None:
        tanh_RNS = logits_RNS.div_(cap).tanh_()
        # d (cap · tanh(x / cap)) / d x = 1 - tanh².
        flattened_RNS = tanh_RNS.square().neg_().add_(1)
        logits_RNS = tanh_RNS.mul_(cap)
    num_queries, num_seen = part.end - part.begin, key_RSE.shape[1]
    by_head = logits_RNS.view(-1, num_queries, num_seen)
    if window is None or num_seen <= window:
        ahead = torch.ones(num_queries, num_queries, dtype=torch.bool, device=by_head.device).triu_(1)
        by_head[..., part.ahead :].masked_fill_(ahead, -torch.inf)
    else:
        places = torch.arange(num_seen, device=by_head.device)
        back = places[part.ahead : part.ahead + num_queries, None] - places
        by_head.masked_fill_((back < 0) | (back >= window), -torch.inf)
    return logits_RNS.softmax(-1), flattened_RNS


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_GHTE: Tensor, key_GRTE: Tensor, value_GRTE: Tensor, layout: Layout, scale: float,
        cap: float | None,
    ) -> Tensor:  # fmt: skip
        num_rows, num_heads, num_tokens, _ = query_GHTE.shape
        num_key_heads, width = value_GRTE.shape[1], value_GRTE.shape[-1]
        result_GTHE = value_GRTE.new_zeros(num_rows, num_tokens, num_heads, width)
        # Autocast would compute in bf16.
        with torch.autocast(query_GHTE.device.type, enabled=False):
            for row, spans in enumerate(layout.rows):
                for part in _parts(spans, layout.window):
                    query_RNE = _by_key_head(query_GHTE[row, :, part.begin : part.end], num_key_heads)
                    key_RSE, value_RSE = _seen(key_GRTE[row], part), _seen(value_GRTE[row], part)
                    weights_RNS, _ = _weights(query_RNE, key_RSE, part, layout.window, scale, cap)
                    by_head = torch.bmm(weights_RNS, value_RSE).view(num_heads, part.end - part.begin, width)
                    result_GTHE[row, part.begin : part.end] = by_head.transpose(0, 1)
        ctx.save_for_backward(query_GHTE, key_GRTE, value_GRTE)
        ctx.layout, ctx.scale, ctx.cap = layout, scale, cap
        return result_GTHE

    @staticmethod
    def backward(ctx: Any, grad_GTHE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query_GHTE, key_GRTE, value_GRTE = ctx.saved_tensors
        grad_query_GHTE = torch.zeros_like(query_GHTE)
        grad_key_GRTE, grad_value_GRTE = torch.zeros_like(key_GRTE), torch.zeros_like(value_GRTE)
        with torch.autocast(query_GHTE.device.type, enabled=False):
            for row, spans in enumerate(ctx.layout.rows):
                # A prompt's keys get gradients from all its completions, which add up in fp32.
                grad_key_RTE, grad_value_RTE = (each[row].float() for each in (grad_key_GRTE, grad_value_GRTE))
                for part in _parts(spans, ctx.layout.window):
                    queries = slice(part.begin, part.end)
                    grad_HNE = grad_GTHE[row, queries].transpose(0, 1)
                    query_HNE, grad_key_RSE, grad_value_RSE = _part_gradients(
                        ctx, part, query_GHTE[row, :, queries], key_GRTE[row], value_GRTE[row], grad_HNE
                    )
                    grad_query_GHTE[row, :, queries] = query_HNE
                    _add_seen(grad_key_RTE, part, grad_key_RSE)
                    _add_seen(grad_value_RTE, part, grad_value_RSE)
                grad_key_GRTE[row], grad_value_GRTE[row] = grad_key_RTE, grad_value_RTE
        return grad_query_GHTE, grad_key_GRTE, grad_value_GRTE, None, None, None


def _part_gradients(
    ctx: Any, part: _Part, query_HNE: Tensor, key_RTE: Tensor, value_RTE: Tensor, grad_HNE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of a part's queries, and of the keys and values that it sees, in fp32."""
    query_RNE, grad_RNE = (_by_key_head(each, key_RTE.shape[0]) for each in (query_HNE, grad_HNE))
    key_RSE, value_RSE = _seen(key_RTE, part), _seen(value_RTE, part)
    weights_RNS, flattened_RNS = _weights(query_RNE, key_RSE, part, ctx.layout.window, ctx.scale, ctx.cap)
    grad_value_RSE = torch.bmm(weights_RNS.mT, grad_RNE)
    # d softmax: weight · (its own gradient - the mean gradient).
    logits_RNS = torch.bmm(grad_RNE, value_RSE.mT).mul_(weights_RNS)
    logits_RNS.addcmul_(weights_RNS, logits_RNS.sum(-1, keepdim=True), value=-1).mul_(ctx.scale)
    if flattened_RNS is not None:
        logits_RNS *= flattened_RNS
    grad_query_RNE, grad_key_RSE = torch.bmm(logits_RNS, key_RSE), torch.bmm(logits_RNS.mT, query_RNE)
    return grad_query_RNE.view(query_HNE.shape), grad_key_RSE, grad_value_RSE
