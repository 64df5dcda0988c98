"""Attention in parts against a softmax over all pairs with a mask, in values and gradients."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig

from tests.training.models.families import SUPPORTED, make_family
from training.data.groups import Group, PackedGroups, pack
from training.models.attention import IN_PARTS, Layout
from training.models.trial import difference

HEADS, KEY_HEADS, WIDTH, SCALE = 6, 2, 8, 0.3
PACKED = pack([Group((1,) * 7, ((2,) * 5, (3,) * 2, (4,) * 9)), Group((1,), ((5,) * 12,)), Group((1,) * 3, ((6,),))])
ATTEND: Any = AttentionInterface()[IN_PARTS]


def states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Queries, keys and values as a layer makes them, [G, heads, T, WIDTH], and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    num_rows, num_tokens = PACKED.tokens_GT.shape
    query, key, value, grad = (
        torch.randn(num_rows, num_tokens, heads, WIDTH, generator=generator).to(dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    return *(each.transpose(1, 2).requires_grad_() for each in (query, key, value)), grad


def by_all_pairs(packed: PackedGroups, window: int | None, cap: float | None, *inputs: Tensor) -> Tensor:
    query, key, value = (each.double() for each in inputs)
    key, value = (each.repeat_interleave(HEADS // KEY_HEADS, 1) for each in (key, value))
    logits = query @ key.mT * SCALE
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    back = packed.positions_GT[:, :, None] - packed.positions_GT[:, None, :]
    attends = packed.attends() & (back < (window or 1000))
    logits = logits.masked_fill(~attends[:, None], -torch.inf)
    result = (logits.softmax(-1) @ value).transpose(1, 2)
    return result * (packed.segments_GT >= 0)[..., None, None]


def in_parts(window: int | None, cap: float | None, *inputs: Tensor) -> Tensor:
    module: Any = SimpleNamespace()
    found: Tensor
    found, _ = ATTEND(module, *inputs, Layout(PACKED.spans, window), scaling=SCALE, softcap=cap)
    return found


@pytest.fixture(params=[256, 4], ids=["whole parts", "cut parts"], autouse=True)
def most_queries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("training.models.attention._MOST_QUERIES", request.param)
    yield


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 16])
def test_values_and_gradients_are_those_of_a_softmax_over_all_pairs(window: int | None, cap: float | None) -> None:
    *inputs, grad = states(torch.float32)
    found, expected = in_parts(window, cap, *inputs), by_all_pairs(PACKED, window, cap, *inputs)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    assert not found[PACKED.segments_GT < 0].any()
    for ours, theirs in zip(
        torch.autograd.grad((found * grad).sum(), inputs),
        torch.autograd.grad((expected * grad).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_in_bf16_it_is_as_exact_as_the_kernel_that_takes_a_mask() -> None:
    """Under autocast too."""
    *inputs, grad = states(torch.bfloat16)
    query, key, value = inputs[0].detach().mul(16).requires_grad_(), *inputs[1:]
    expected = by_all_pairs(PACKED, None, None, query, key, value)
    exact = expected, *torch.autograd.grad((expected * grad).sum(), (query, key, value))
    mask = PACKED.attends()[:, None]
    errors = []
    for attend in (
        lambda: in_parts(None, None, query, key, value),
        lambda: torch.nn.functional.scaled_dot_product_attention(
            query, *(each.repeat_interleave(HEADS // KEY_HEADS, 1) for each in (key, value)),
            attn_mask=mask, scale=SCALE,
        ).transpose(1, 2) * (PACKED.segments_GT >= 0)[..., None, None],
    ):  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            found = attend()
            gradients = torch.autograd.grad((found * grad).sum(), (query, key, value))
        assert found.dtype == torch.bfloat16
        errors.append([
            float((ours.detach().double() - theirs.detach()).norm() / theirs.detach().double().norm())
            for ours, theirs in zip((found, *gradients), exact, strict=True)
        ])  # fmt: skip
    assert all(ours < 1.05 * theirs for ours, theirs in zip(*errors, strict=True)), errors


def test_sinks_are_refused() -> None:
    *inputs, _ = states(torch.float32)
    with pytest.raises(NotImplementedError, match="sinks"):
        ATTEND(SimpleNamespace(), *inputs, Layout(PACKED.spans, None), s_aux=torch.zeros(HEADS))


@pytest.mark.parametrize("family", ["gemma2", "llama", "mistral"])
def test_where_attention_takes_a_mask_a_family_is_computed_as_the_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """As on a GPU."""
    monkeypatch.setattr("training.models.anatomy.in_parts", lambda device: False)
    make_family(family, SUPPORTED[family], tmp_path)
    assert difference(tmp_path, AutoConfig.from_pretrained(tmp_path)) < 2e-5
