"""Log-probabilities of given tokens from hidden states, in chunks, so that no tensor over the vocabulary is ever kept.

The output embedding is frozen and gets no gradient. So for each token the backward pass needs only one vector of the
hidden state's width: the slope of the token's log-probability. The forward pass computes this slope while it has the
logits. That takes four products of the width and the vocabulary for each token, where computing the logits again would
take six.

Shapes: M tokens, D width of the hidden state, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 512


def label_logprobs(hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor) -> Tensor:
    """Returns log softmax(hidden · headᵀ)[label], [M] in fp32 and in nats. Gradients flow to `hidden_MD`."""
    logprobs_M: Tensor = _LabelLogprobs.apply(hidden_MD, head_VD, labels_M)  # type: ignore[no-untyped-call]
    return logprobs_M


@torch.no_grad()
def label_logprobs_and_entropy(hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same log-probabilities, without gradients, and the entropy of each softmax, both [M]."""
    logprobs, entropies = [], []
    for hidden_CD, labels_C in zip(hidden_MD.split(CHUNK_TOKENS), labels_M.split(CHUNK_TOKENS), strict=True):
        logits_CV, probabilities_CV, norm_C = _softmax(hidden_CD, head_VD)
        logprobs.append(_picked(logits_CV, labels_C) - norm_C)
        entropies.append(norm_C - (probabilities_CV * logits_CV).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def _logits(hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
    return (hidden_CD.to(head_VD.dtype) @ head_VD.T).float()


def _softmax(hidden_CD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits and probabilities in fp32, and the log of the softmax's denominator.

    The denominator follows from the likeliest token, whose probability is never small. This reads the vocabulary once
    less than a sum over it.
    """
    logits_CV = _logits(hidden_CD, head_VD)
    probabilities_CV = logits_CV.softmax(-1)
    return logits_CV, probabilities_CV, logits_CV.amax(-1) - probabilities_CV.amax(-1).log()


def _picked(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    return logits_CV.gather(-1, labels_C[:, None])[:, 0]


class _LabelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor) -> Tensor:
        logprobs, slopes = [], []
        for hidden_CD, labels_C in zip(hidden_MD.split(CHUNK_TOKENS), labels_M.split(CHUNK_TOKENS), strict=True):
            if ctx.needs_input_grad[0]:
                logits_CV, probabilities_CV, norm_C = _softmax(hidden_CD, head_VD)
                # d logprob / d logits = onehot(label) - softmax.
                expected_CD = probabilities_CV.to(head_VD.dtype) @ head_VD
                slopes.append(head_VD[labels_C].float() - expected_CD.float())
            else:
                logits_CV = _logits(hidden_CD, head_VD)
                norm_C = logits_CV.logsumexp(-1)
            logprobs.append(_picked(logits_CV, labels_C) - norm_C)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
            ctx.hidden_dtype = hidden_MD.dtype
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:
        (slopes_MD,) = ctx.saved_tensors
        return (grad_M[:, None] * slopes_MD).to(ctx.hidden_dtype), None, None
