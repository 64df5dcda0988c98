"""Log-probabilities in chunks against a softmax over the whole vocabulary, and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.models.logprobs import CHUNK_TOKENS, Head, label_logprobs, label_logprobs_and_entropy

VOCABULARY, WIDTH = 50, 8


def tokens(num: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, an output embedding and labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden_MD = torch.randn(num, WIDTH, generator=generator, requires_grad=True)
    head_VD = torch.randn(VOCABULARY, WIDTH, generator=generator)
    return hidden_MD, head_VD, torch.randint(VOCABULARY, (num,), generator=generator)


def whole(hidden_MD: Tensor, head_VD: Tensor) -> Tensor:
    return torch.log_softmax(hidden_MD @ head_VD.T, dim=-1)


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1]), st.integers(0, 1000))
def test_values_and_gradients_are_those_of_the_whole_softmax(num: int, seed: int) -> None:
    hidden_MD, head_VD, labels_M = tokens(num, seed)
    weights_M = torch.linspace(-1, 1, num)
    found_M = label_logprobs(hidden_MD, Head(head_VD), labels_M)
    expected_M = whole(hidden_MD, head_VD).gather(-1, labels_M[:, None])[:, 0]
    torch.testing.assert_close(found_M, expected_M)
    (found,) = torch.autograd.grad((found_M * weights_M).sum(), hidden_MD)
    (expected,) = torch.autograd.grad((expected_M * weights_M).sum(), hidden_MD)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "cap", "biased"), [(0.25, None, False), (1.0, 3.0, False), (1.0, None, True), (0.5, 2.0, True)]
)
def test_scales_caps_and_biases_reach_values_entropy_and_gradients(
    scale: float, cap: float | None, biased: bool
) -> None:
    hidden_MD, head_VD, labels_M = tokens(CHUNK_TOKENS + 3)
    bias_V = torch.linspace(-2, 2, VOCABULARY) if biased else None
    head = Head(head_VD, bias_V, scale, cap)
    logits_MV = scale * (hidden_MD @ head_VD.T + (0 if bias_V is None else bias_V))
    logprobs_MV = (logits_MV if cap is None else cap * torch.tanh(logits_MV / cap)).log_softmax(-1)
    weights_M = torch.linspace(-1, 1, len(labels_M))
    found_M, expected_M = label_logprobs(hidden_MD, head, labels_M), logprobs_MV.gather(-1, labels_M[:, None])[:, 0]
    torch.testing.assert_close(found_M, expected_M)
    (found,) = torch.autograd.grad((found_M * weights_M).sum(), hidden_MD)
    (expected,) = torch.autograd.grad((expected_M * weights_M).sum(), hidden_MD, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    _, entropy_M = label_logprobs_and_entropy(hidden_MD, head, labels_M)
    torch.testing.assert_close(entropy_M, -(logprobs_MV.exp() * logprobs_MV).sum(-1).detach())


def test_entropy_is_that_of_the_whole_softmax() -> None:
    hidden_MD, head_VD, labels_M = tokens(CHUNK_TOKENS + 1)
    logprobs_M, entropy_M = label_logprobs_and_entropy(hidden_MD, Head(head_VD), labels_M)
    logprobs_MV = whole(hidden_MD.detach(), head_VD)
    torch.testing.assert_close(logprobs_M, logprobs_MV.gather(-1, labels_M[:, None])[:, 0])
    torch.testing.assert_close(entropy_M, -(logprobs_MV.exp() * logprobs_MV).sum(-1))


def test_in_bf16_the_gradient_keeps_its_direction() -> None:
    hidden_MD, head_VD, labels_M = tokens(64)
    (exact,) = torch.autograd.grad(label_logprobs(hidden_MD, Head(head_VD), labels_M).sum(), hidden_MD)
    (rough,) = torch.autograd.grad(label_logprobs(hidden_MD, Head(head_VD.bfloat16()), labels_M).sum(), hidden_MD)
    assert torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.999
