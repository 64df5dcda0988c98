"""Lays a prompt and its K completions out in one row, so that the prompt is encoded once and each completion once.

Completions of a row attend to the prompt and to themselves, never to each other, and the positions of each begin after
the prompt's. So each completion is encoded exactly as if it were alone in its row. A row of K completions of length c
after a prompt of length p costs p + K c tokens instead of K (p + c).

Shapes: G groups, T tokens of the longest row, N completions over all groups, C tokens of the longest completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

PROMPT, _PADDING = 0, -1


@dataclass(frozen=True)
class Group:
    """One prompt and completions of it, in token ids. A completion that the policy ended has its end token."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.completions or not all(self.completions):
            raise ValueError("a group needs a prompt and completions, none of them empty")

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True)
class RankedExample:
    """One ranking: completions of a prompt and the rank of each, 0 the best, equal for a tie."""

    group: Group
    ranks: tuple[int, ...]
    labeler: str = ""
    seq: int = 0
    """The ranking's number in the store, which grows with time."""


@dataclass(frozen=True)
class Span:
    """Tokens `begin` to `end` of a row: each attends to the row's first `seen` tokens, and to the span's up to itself.

    A prompt has seen nothing before, and a completion has seen its prompt.
    """

    begin: int
    end: int
    seen: int


@dataclass(frozen=True)
class PackedGroups:
    """Groups as tensors. A place is an index into the rows laid end to end, that is into a tensor of G * T."""

    tokens_GT: Tensor
    positions_GT: Tensor
    segments_GT: Tensor
    """0 for a prompt's tokens, 1 to K for those of each completion, -1 for padding."""
    labels_NC: Tensor
    """The completions' tokens; 0 beyond their ends."""
    mask_NC: Tensor
    """True on the completions' tokens."""
    before_NC: Tensor
    """The place before each token, whose hidden state predicts the token and gives its value."""
    last_N: Tensor
    """The place of each completion's last token, where the completion is scored."""
    group_sizes: tuple[int, ...]
    """Completions of each group."""
    spans: tuple[tuple[Span, ...], ...]
    """Each row's prompt and completions."""

    def to(self, device: torch.device) -> Self:
        """Returns the same groups on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device) if isinstance(value, Tensor) else value
        return replace(self, **moved)

    def attends(self) -> Tensor:
        """Returns the mask of attention [G, T, T]: True where the token of the second axis attends to the third's.

        Padding attends to padding, because a softmax over nothing is NaN.
        """
        num_tokens, segments_GT = self.segments_GT.shape[1], self.segments_GT
        causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segments_GT.device).tril()
        same_GTT = segments_GT[:, :, None] == segments_GT[:, None, :]
        prompt_GTT = (segments_GT == PROMPT)[:, None, :].expand_as(same_GTT)
        return causal_TT & (same_GTT | prompt_GTT)


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits rows into batches of similar length, the shortest first; returns the indices of each batch's rows.

    A batch, padded to its longest row, has at most `max_tokens` tokens, unless it is a single row that is longer.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pack(groups: Sequence[Group]) -> PackedGroups:
    """Lays out groups, one in each row, padded to the longest row."""
    num_tokens = max(map(len, groups))
    tokens_GT = torch.zeros(len(groups), num_tokens, dtype=torch.long)
    positions_GT = torch.zeros_like(tokens_GT)
    segments_GT = torch.full_like(tokens_GT, _PADDING)
    for row, group in enumerate(groups):
        tokens, positions, segments = _row(group)
        tokens_GT[row, : len(tokens)] = torch.tensor(tokens)
        positions_GT[row, : len(tokens)] = torch.tensor(positions)
        segments_GT[row, : len(tokens)] = torch.tensor(segments)
    labels_NC, mask_NC, before_NC = _completions(groups, num_tokens)
    return PackedGroups(
        tokens_GT=tokens_GT,
        positions_GT=positions_GT,
        segments_GT=segments_GT,
        labels_NC=labels_NC,
        mask_NC=mask_NC,
        before_NC=before_NC,
        last_N=_last(groups, num_tokens),
        group_sizes=tuple(len(group.completions) for group in groups),
        spans=tuple(map(_spans, groups)),
    )


def _row(group: Group) -> tuple[list[int], list[int], list[int]]:
    num_prompt = len(group.prompt)
    tokens, positions = list(group.prompt), list(range(num_prompt))
    segments = [PROMPT] * num_prompt
    for index, completion in enumerate(group.completions, start=1):
        tokens += completion
        positions += range(num_prompt, num_prompt + len(completion))
        segments += [index] * len(completion)
    return tokens, positions, segments


def _spans(group: Group) -> tuple[Span, ...]:
    num_prompt = len(group.prompt)
    places = zip(_starts(group), group.completions, strict=True)
    return Span(0, num_prompt, 0), *(Span(start, start + len(each), num_prompt) for start, each in places)


def _starts(group: Group) -> list[int]:
    """Returns where each completion begins in its row."""
    return list(accumulate((len(completion) for completion in group.completions), initial=len(group.prompt)))[:-1]


def _completions(groups: Sequence[Group], num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    completions = [completion for group in groups for completion in group.completions]
    shape = len(completions), max(map(len, completions))
    labels_NC = torch.zeros(shape, dtype=torch.long)
    mask_NC = torch.zeros(shape, dtype=torch.bool)
    before_NC = torch.zeros(shape, dtype=torch.long)
    index = 0
    for row, group in enumerate(groups):
        for start, completion in zip(_starts(group), group.completions, strict=True):
            length, offset = len(completion), row * num_tokens
            labels_NC[index, :length] = torch.tensor(completion)
            mask_NC[index, :length] = True
            before_NC[index, :length] = offset + start - 1 + torch.arange(length)
            # The prompt's last token predicts the first token of each completion, and is not beside it in the row.
            before_NC[index, 0] = offset + len(group.prompt) - 1
            index += 1
    return labels_NC, mask_NC, before_NC


def _last(groups: Sequence[Group], num_tokens: int) -> Tensor:
    places = [
        row * num_tokens + start + len(completion) - 1
        for row, group in enumerate(groups)
        for start, completion in zip(_starts(group), group.completions, strict=True)
    ]
    return torch.tensor(places)
