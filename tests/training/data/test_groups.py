"""Packed completions are encoded exactly as they would be alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.data.groups import Group, micro_batches, pack
from training.models.policy import SharedLayers, UpperLayers, completion_logprobs, reference_logprobs

GROUPS = [
    Group((1, 5, 9, 300), ((7, 8, 2), (11,), (12, 13, 14, 15, 2))),
    Group((1, 40), ((200, 201, 202, 203), (204, 2))),
]


def naive_logprobs(shared: SharedLayers, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    logits_TV = shared.model(torch.tensor([prompt + completion])).logits[0].double()
    logprobs_TV = torch.log_softmax(logits_TV, -1)
    return torch.stack([logprobs_TV[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])


@pytest.mark.parametrize("level", [0, 1])
def test_packed_logprobs_equal_separate_full_softmax(shared: SharedLayers, level: int) -> None:
    shared.model.float()
    packed = pack(GROUPS)
    hidden_GTD = shared.encode(packed, [level])[level]
    upper = UpperLayers(shared.model, level, shared.num_layers)
    logprobs_NC = completion_logprobs(upper(hidden_GTD, packed, shared.angles(packed)), shared.head, packed)
    alone = [(group.prompt, completion) for group in GROUPS for completion in group.completions]
    for row, (prompt, completion) in enumerate(alone):
        expected = naive_logprobs(shared, prompt, completion)
        torch.testing.assert_close(logprobs_NC[row, : len(completion)].double(), expected, atol=1e-5, rtol=0)
        assert not logprobs_NC[row, len(completion) :].any()


def test_the_reference_reads_each_completion_as_a_full_softmax_would(shared: SharedLayers) -> None:
    shared.model.float()
    alone = [(group.prompt, completion) for group in GROUPS for completion in group.completions]
    expected = [float(naive_logprobs(shared, prompt, completion).sum()) for prompt, completion in alone]
    assert reference_logprobs(shared, GROUPS) == pytest.approx(expected, abs=1e-4)


def test_last_place_is_the_last_token_of_each_completion() -> None:
    packed = pack(GROUPS)
    last = packed.tokens_GT.flatten()[packed.last_N]
    assert last.tolist() == [2, 11, 2, 203, 2]
    assert packed.group_sizes == (3, 2)


def test_completions_do_not_see_each_other(shared: SharedLayers) -> None:
    changed = [Group(GROUPS[0].prompt, ((99, 98, 97), *GROUPS[0].completions[1:])), GROUPS[1]]
    hidden = [shared.encode(pack(groups), [2])[2].flatten(0, 1)[pack(groups).last_N] for groups in (GROUPS, changed)]
    assert not torch.equal(hidden[0][0], hidden[1][0])
    torch.testing.assert_close(hidden[0][1:], hidden[1][1:], atol=0, rtol=0)


@pytest.mark.parametrize("group", [((), ((1,),)), ((1,), ()), ((1,), ((),))])
def test_refuses_what_is_empty(group: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]) -> None:
    with pytest.raises(ValueError, match="none of them empty"):
        Group(*group)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), max_tokens=st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_limit(lengths: list[int], max_tokens: int) -> None:
    batches = micro_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in batches)
