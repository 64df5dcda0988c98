"""Labelers who agree as often as people do: Bradley-Terry choices over a utility, seeded, with calibrated noise.

A labeler adds independent standard Gumbel noise g to each completion's utility u over a temperature T, and ranks by
u/T + g. The difference of two standard Gumbels is standard logistic, so for every pair
    P(i over j) = P(g_j - g_i < (u_i - u_j) / T) = sigmoid((u_i - u_j) / T),
which is Bradley-Terry, and the whole ranking is a draw from Plackett-Luce (Luce 1959; Yellott 1977).

Two such labelers, independent of each other, agree on a pair with probability p^2 + (1 - p)^2. InstructGPT's agreed on
72.6 % of comparisons (arXiv 2203.02155, section 3.4); `calibrate_temperature` finds the T at which these do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np
import numpy.typing as npt

_INSTRUCTGPT_AGREEMENT = 0.726


class CalibrationError(ValueError):
    """No temperature gives the requested agreement."""


@dataclass(frozen=True)
class Labeler:
    """One simulated person. Labelers with equal fields rank equal completions equally, in any process and order."""

    user_id: str
    seed: int
    temperature: float
    """In units of the utility, above 0."""

    def rank(self, prompt: str, completions: Sequence[str], utilities: Sequence[float]) -> list[list[int]]:
        """Returns a ranking of the completions of a prompt: groups of their indices, best first.

        A group of two or more is a tie. Completions with the same text are tied, and no others.
        """
        drawn = [
            utility / self.temperature + self._gumbel(prompt, completion)
            for completion, utility in zip(completions, utilities, strict=True)
        ]
        order = sorted(range(len(drawn)), key=lambda i: -drawn[i])
        return [list(group) for _, group in groupby(order, key=lambda i: drawn[i])]

    def _gumbel(self, prompt: str, completion: str) -> float:
        """Returns standard Gumbel noise that depends only on the labeler's seed, the prompt and the completion."""
        digest = hashlib.sha256(repr((self.seed, prompt, completion)).encode()).digest()
        uniform = (int.from_bytes(digest[:6]) + 0.5) / 2**48
        return -math.log(-math.log(uniform))


def make_labelers(num_users: int, seed: int, temperature: float) -> list[Labeler]:
    """Returns `num_users` labelers, each with a seed of its own that follows from `seed`."""
    return [Labeler(f"simulated-{i:03d}", seed * 1_000_003 + i, temperature) for i in range(num_users)]


def calibrate_temperature(groups: Iterable[Sequence[float]], agreement: float = _INSTRUCTGPT_AGREEMENT) -> float:
    """Returns the temperature at which two labelers are expected to agree on the share `agreement` of all comparisons.

    Expected agreement falls steadily from its greatest value to 1/2 as temperature rises, so bisection finds the one
    answer.

    Args:
        groups: for each prompt, the utilities of its completions.
        agreement: a share between 1/2 and 1.

    Raises:
        CalibrationError: `agreement` is out of range, there are no comparisons, or too many are between completions
            of equal utility.
    """
    gaps = np.abs([a - b for group in groups for a, b in combinations(group, 2)])
    widest = float(gaps.max(initial=0.0))
    if not 0.5 < agreement < 1.0:
        raise CalibrationError(f"agreement must lie between 0.5 and 1, and is {agreement}")
    if widest == 0.0:
        raise CalibrationError(f"{len(gaps)} comparisons, none with a difference in utility: nothing to agree on")
    coldest, hottest = math.log(widest) - 20.0, math.log(widest) + 20.0
    if (reached := _expected_agreement(gaps, math.exp(coldest))) < agreement:
        raise CalibrationError(
            f"labelers of this utility agree on {reached:.1%} of comparisons even without noise, below {agreement:.1%}"
        )
    for _ in range(60):
        middle = (coldest + hottest) / 2
        too_cold = _expected_agreement(gaps, math.exp(middle)) > agreement
        coldest, hottest = (middle, hottest) if too_cold else (coldest, middle)
    return math.exp((coldest + hottest) / 2)


def _expected_agreement(gaps: npt.NDArray[np.float64], temperature: float) -> float:
    """Returns the mean of p^2 + (1 - p)^2 over `gaps` [comparisons] in utility, where p = sigmoid(gap / T)."""
    # With t = tanh(gap / 2T), p = (1 + t) / 2, and so p^2 + (1 - p)^2 = (1 + t^2) / 2.
    return float(np.mean((1.0 + np.tanh(gaps / (2.0 * temperature)) ** 2) / 2.0))
