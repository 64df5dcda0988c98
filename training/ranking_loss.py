"""The reward model's loss: how likely a labeler's ranking is under the scores, by the model of Bradley and Terry.

Pure functions of scores and ranks; nothing here knows a model.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def comparisons(ranks_K: Tensor) -> Tensor:
    """Returns a [K, K] mask: true at [i, j] where completion i was preferred to j. Equal ranks give no comparison."""
    return ranks_K[:, None] < ranks_K[None, :]


def ranking_loss(scores_K: Tensor, ranks_K: Tensor) -> Tensor:
    """-1/(K choose 2) Σ log σ(r_w - r_l) over the comparisons of one ranking (InstructGPT, equation 1).

    `ranks_K` has 0 for the best; equal ranks are a tie. A ranking that is all ties has loss 0 and no gradient.
    """
    num_completions = len(scores_K)
    margins_KK = scores_K[:, None] - scores_K[None, :]
    # where, not a product: a masked-out infinity must not become NaN.
    losses_KK = torch.where(comparisons(ranks_K), -logsigmoid(margins_KK), 0.0)
    return losses_KK.sum() / max(1, num_completions * (num_completions - 1) // 2)


def num_correct(scores_K: Tensor, ranks_K: Tensor) -> tuple[float, int]:
    """Returns how many comparisons the scores order as the labeler did (an equal score counts half), and how many
    there are."""
    preferred_KK = comparisons(ranks_K)
    margins_KK = scores_K[:, None] - scores_K[None, :]
    correct = (margins_KK > 0).double() + 0.5 * (margins_KK == 0).double()
    return float(correct[preferred_KK].sum()), int(preferred_KK.sum())
