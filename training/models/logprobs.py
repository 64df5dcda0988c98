"""Log-probabilities of given tokens from hidden states, in chunks, so that no tensor over the vocabulary is ever kept.

The output embedding is frozen and gets no gradient. So for each token the backward pass needs only one vector of the
hidden state's width: the slope of the token's log-probability. The forward pass computes this slope while it has the
logits. That takes four products of the width and the vocabulary for each token, where computing the logits again would
take six.

Some models scale their logits, or cap them softly: cap · tanh(logits / cap).

Shapes: M tokens, D width of the hidden state, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 256
"""Tokens whose logits are in memory at once: few, but enough for a product with the output embedding to be fast."""


@dataclass(frozen=True)
class Head:
    """An output embedding, and how logits follow from it: cap(scale · (hidden · weightᵀ + bias))."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None


def label_logprobs(hidden_MD: Tensor, head: Head, labels_M: Tensor) -> Tensor:
    """Returns log softmax(logits)[label], [M] in fp32 and in nats. Gradients flow to `hidden_MD`."""
    logprobs_M: Tensor = _LabelLogprobs.apply(hidden_MD, head, labels_M, False)[0]  # type: ignore[no-untyped-call]
    return logprobs_M


def label_logprobs_and_entropy(hidden_MD: Tensor, head: Head, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same log-probabilities and the entropy of each softmax, both [M]. The entropy has no gradient."""
    both: tuple[Tensor, Tensor] = _LabelLogprobs.apply(hidden_MD, head, labels_M, True)  # type: ignore[no-untyped-call]
    return both


def _logits(hidden_CD: Tensor, head: Head) -> Tensor:
    logits_CV = (hidden_CD.to(head.weight_VD.dtype) @ head.weight_VD.T).float()
    if head.bias_V is not None:
        logits_CV += head.bias_V
    if head.scale != 1:
        logits_CV *= head.scale
    if head.cap is not None:
        logits_CV.div_(head.cap).tanh_().mul_(head.cap)
    return logits_CV


def _softmax(hidden_CD: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits and probabilities in fp32, and the log of the softmax's denominator.

    The denominator follows from the likeliest token, whose probability is never small. This reads the vocabulary once
    less than a sum over it.
    """
    logits_CV = _logits(hidden_CD, head)
    probabilities_CV = logits_CV.softmax(-1)
    return logits_CV, probabilities_CV, logits_CV.amax(-1) - probabilities_CV.amax(-1).log()


def _mean_logit(logits_CV: Tensor, probabilities_CV: Tensor) -> Tensor:
    """Returns the mean logit of each token's softmax. As one product it makes no third tensor over the vocabulary."""
    return torch.bmm(probabilities_CV[:, None], logits_CV[:, :, None])[:, 0, 0]


def _picked(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    return logits_CV.gather(-1, labels_C[:, None])[:, 0]


def _slope(head: Head, logits_CV: Tensor, probabilities_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Returns d logprob / d hidden, [C, D]. It overwrites `probabilities_CV`."""
    # d logprob / d logits = onehot(label) - softmax. The gathered rows are a copy, which becomes the slope in place.
    label_CD = head.weight_VD[labels_C].float()
    if head.cap is not None:
        # d (cap · tanh(x / cap)) / d x = 1 - tanh².
        below_cap_CV = (logits_CV / head.cap).square_().neg_().add_(1)
        label_CD *= _picked(below_cap_CV, labels_C)[:, None]
        probabilities_CV *= below_cap_CV
    label_CD -= probabilities_CV.to(head.weight_VD.dtype) @ head.weight_VD
    return label_CD.mul_(head.scale)


def _chunk(
    hidden_CD: Tensor, head: Head, labels_C: Tensor, *, with_entropy: bool, with_slope: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns log-probabilities, and entropies and slopes if asked. When it returns, its logits are gone."""
    if not (with_entropy or with_slope):
        logits_CV = _logits(hidden_CD, head)
        return _picked(logits_CV, labels_C) - logits_CV.logsumexp(-1), None, None
    logits_CV, probabilities_CV, norm_C = _softmax(hidden_CD, head)
    logprobs_C = _picked(logits_CV, labels_C) - norm_C
    entropy_C = norm_C - _mean_logit(logits_CV, probabilities_CV) if with_entropy else None
    slope_CD = _slope(head, logits_CV, probabilities_CV, labels_C) if with_slope else None
    return logprobs_C, entropy_C, slope_CD


class _LabelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, head: Head, labels_M: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        needs_slope: bool = ctx.needs_input_grad[0]
        chunks = [
            _chunk(hidden_CD, head, labels_C, with_entropy=with_entropy, with_slope=needs_slope)
            for hidden_CD, labels_C in zip(hidden_MD.split(CHUNK_TOKENS), labels_M.split(CHUNK_TOKENS), strict=True)
        ]
        logprobs, entropies, slopes = zip(*chunks, strict=True)
        if needs_slope:
            ctx.save_for_backward(torch.cat(slopes))
            ctx.hidden_dtype = hidden_MD.dtype
        entropy_M = torch.cat(entropies) if with_entropy else None
        if entropy_M is not None:
            ctx.mark_non_differentiable(entropy_M)
        return torch.cat(logprobs), entropy_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None]:
        (slopes_MD,) = ctx.saved_tensors
        return (grad_M[:, None] * slopes_MD).to(ctx.hidden_dtype), None, None, None
