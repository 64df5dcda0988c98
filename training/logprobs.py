"""Log-probabilities of given tokens from hidden states, in chunks, so that no tensor over the vocabulary is ever kept.

The forward pass keeps one number a token, the log of the softmax's denominator; the backward pass makes each chunk's
logits again. The output embedding is frozen and gets no gradient.

M tokens, D width of the hidden state, V vocabulary.
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
    """Returns the same, without gradients, and the entropy of each softmax besides, both [M]."""
    logprobs, entropies = [], []
    for hidden_CD, labels_C in zip(hidden_MD.split(CHUNK_TOKENS), labels_M.split(CHUNK_TOKENS), strict=True):
        logits_CV, norm_C = _logits(hidden_CD, head_VD)
        logprobs.append(_picked(logits_CV, labels_C) - norm_C)
        mean_logit_C = ((logits_CV - norm_C[:, None]).exp_() * logits_CV).sum(-1)
        entropies.append(norm_C - mean_logit_C)
    return torch.cat(logprobs), torch.cat(entropies)


def _logits(hidden_CD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in fp32, and the log of the softmax's denominator."""
    logits_CV = (hidden_CD.to(head_VD.dtype) @ head_VD.T).float()
    return logits_CV, logits_CV.logsumexp(-1)


def _picked(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    return logits_CV.gather(-1, labels_C[:, None])[:, 0]


class _LabelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor) -> Tensor:
        picked, norms = [], []
        for hidden_CD, labels_C in zip(hidden_MD.split(CHUNK_TOKENS), labels_M.split(CHUNK_TOKENS), strict=True):
            logits_CV, norm_C = _logits(hidden_CD, head_VD)
            picked.append(_picked(logits_CV, labels_C))
            norms.append(norm_C)
        norm_M = torch.cat(norms)
        ctx.save_for_backward(hidden_MD, head_VD, labels_M, norm_M)
        return torch.cat(picked) - norm_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:
        """d logprob / d logits = onehot(label) - softmax."""
        hidden_MD, head_VD, labels_M, norm_M = ctx.saved_tensors
        grads = []
        for hidden_CD, labels_C, norm_C, grad_C in zip(
            *(tensor.split(CHUNK_TOKENS) for tensor in (hidden_MD, labels_M, norm_M, grad_M)), strict=True
        ):
            logits_CV = (hidden_CD.to(head_VD.dtype) @ head_VD.T).float()
            grad_CV = (logits_CV - norm_C[:, None]).exp_().mul_(-grad_C[:, None])
            grad_CV.scatter_add_(-1, labels_C[:, None], grad_C[:, None])
            grads.append(grad_CV.to(head_VD.dtype) @ head_VD)
        return torch.cat(grads).to(hidden_MD.dtype), None, None
