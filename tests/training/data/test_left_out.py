"""What a run reads is all accounted for, and a sample that cannot be rendered is left out and named."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignd.v1 import types_pb2
from feedback.bus.contract import Position
from feedback.store.ledger import Ledger
from feedback.store.reader import Store
from feedback.store.stored import RankedCompletion, RankedGroup, StoredDemonstration, StoredPrompt
from tests.feedback.events import chat, ranking, sample
from tests.feedback.store.writing import write_events
from training.attempts import run_once
from training.config import TrainingConfig
from training.context import TrainerContext
from training.data.census import HELD_OUT_IN_PART, NO_COMPARISON, Census, LeftOut, figures, sentences
from training.data.dataset import Dataset, make_dataset
from training.data.demonstrations import choose
from training.data.new_rankings import New, NewRankings
from training.data.readable import has_comparison
from training.data.rendering import NotRenderedError, rendered_prompt, rendering
from training.data.split import is_held_out
from training.models.parallel import ALONE
from training.runs.folder import Origin, RunFolder
from training.runs.record import METRICS, read_lines

SHARE = 0.4
LEARNED, OTHER = [f"u{i}" for i in range(100) if not is_held_out(f"u{i}", SHARE)][:2]
HELD_OUT = next(f"u{i}" for i in range(100) if is_held_out(f"u{i}", SHARE))
# Of a reference that was fine-tuned elsewhere: it takes no system turn, and looks at the first message.
STRICT = (
    "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif -%}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] }}{% endfor -%}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_folder)
    loaded.chat_template = STRICT
    return loaded


def with_roles(*roles: int) -> types_pb2.Prompt:
    messages = [types_pb2.Message(role=role, content="Hi") for role in roles]  # type: ignore[arg-type]
    return types_pb2.Prompt(chat=types_pb2.Chat(messages=messages))


UNRENDERED = {
    "an empty text": types_pb2.Prompt(text=""),
    "no content": types_pb2.Prompt(),
    "a chat without turns": types_pb2.Prompt(chat=types_pb2.Chat()),
    "role 0": with_roles(0),
    "role 99": with_roles(99),
    "a turn that the template refuses": with_roles(types_pb2.ROLE_SYSTEM, types_pb2.ROLE_USER),
}
GOOD = {"short": chat("Why?"), "long": chat("why " * 100), "text": types_pb2.Prompt(text="Once upon")}
PROMPTS = GOOD | UNRENDERED


def group(
    seq: int, prompt: str, user: str = LEARNED, ranks: Sequence[int] = (0, 1), spanning: tuple[int, ...] = (),
    first: str = "", texts: Sequence[str] = ("yes", "no", "perhaps"),
) -> RankedGroup:  # fmt: skip
    written = enumerate(zip(texts, ranks, strict=False))
    ranked = tuple(RankedCompletion(f"c{n}", text, False, rank, 1) for n, (text, rank) in written)
    place = Position("rankings", 0, seq)
    return RankedGroup(seq, f"r{seq}", f"s{seq}", user, PROMPTS[prompt], ranked, place, first or user, spanning)


def dataset(tokenizer: PreTrainedTokenizerBase, groups: Sequence[RankedGroup]) -> Dataset:
    prompts = [StoredPrompt(each.sample_id, each.first_user_id, each.prompt) for each in groups]
    return make_dataset(tokenizer, groups, prompts, held_out_share=SHARE, max_prompt_tokens=64, max_group_tokens=80)


def test_whatever_cannot_be_rendered_is_left_out_counted_and_named(tokenizer: PreTrainedTokenizerBase) -> None:
    groups = [group(0, "short"), *(group(seq, name) for seq, name in enumerate(UNRENDERED, start=1))]
    data = dataset(tokenizer, groups)
    assert ([each.seq for each in data.training], [each.sample_id for each in data.training_prompts]) == ([0], ["s0"])
    for each in data.censuses:
        assert each.left_out == {"not_rendered": len(UNRENDERED)}
        assert each.unrendered.startswith("s1 (TemplateError: the prompt has no token); s2 (")
        assert "s5 (TemplateError: there is no role 99)" in each.unrendered
        assert each.unrendered.endswith("; …")
    stored = [
        StoredDemonstration(seq, f"d{seq}", f"s{seq}", LEARNED, prompt, "So.", LEARNED)
        for seq, prompt in enumerate(UNRENDERED.values())
    ]
    chosen = choose(
        tokenizer, stored, held_out_share=SHARE, validation_share=SHARE, max_tokens=99, max_prompt_tokens=99
    )
    assert (chosen.learned, chosen.asked) == ([], [])
    assert chosen.census.left_out == {"not_rendered": len(UNRENDERED)}


def test_an_error_of_the_machine_is_not_taken_for_one_of_the_sample() -> None:
    for error in (OSError(28, "No space left on device"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), rendering():
            raise error
    for error in (ZeroDivisionError(), RecursionError("too deep"), type("PanicException", (BaseException,), {})("no")):
        with pytest.raises(NotRenderedError, match=type(error).__name__), rendering():
            raise error


def test_each_reason_is_told_from_the_others(tokenizer: PreTrainedTokenizerBase) -> None:
    groups = [
        replace(group(1, "short"), off_distribution=True),
        group(2, "short", user=HELD_OUT),
        group(3, "short", first=HELD_OUT),
        group(4, "short", ranks=(0, 0)),
        group(5, "short", ranks=(0,), spanning=(1,)),
        group(6, "short", ranks=(0, 0), spanning=(0,)),
        replace(group(7, "long"), off_distribution=True),
        group(8, "short", texts=["yes", "no " * 100]),
        group(9, "short", ranks=(0, 1, 2), texts=["yes", "no", "perhaps " * 100]),
        group(10, "short", texts=["yes", ""]),
        group(11, "role 99"),
    ]
    rankings, prompts = dataset(tokenizer, groups).censuses
    assert (rankings.num_read, rankings.num_learned, rankings.num_measured, rankings.num_shortened) == (11, 2, 1, 1)
    assert rankings.left_out == {
        "held_out_in_part": 1, "no_comparison": 3, "spans_swap": 1, "prompt_too_long": 1, "too_long": 1,
        "not_rendered": 1,
    }  # fmt: skip
    assert prompts.left_out == {"too_long": 1, "not_rendered": 1}
    whole = rankings.with_unread(no_sample=4, superseded=0, older=0)
    assert (whole.num_read, whole.left_out["no_sample"], "superseded" in whole.left_out) == (15, 4, False)
    (said,) = sentences(figures([whole]))
    assert said.startswith(
        "15 rankings: 2 learned from, 1 to measure with, 1 of both drawn off the policy's distribution, "
        "12 left out: 4 without their sample in the store, 3 without a comparison, 1 held out by user or by prompt, "
        "but not by both"
    )


USERS = st.sampled_from([LEARNED, OTHER, HELD_OUT])
GROUPS = st.builds(
    group,
    seq=st.integers(1, 99),
    prompt=st.sampled_from(list(PROMPTS)),
    user=USERS,
    first=USERS,
    ranks=st.lists(st.integers(0, 2), max_size=3),
    spanning=st.lists(st.integers(0, 2), max_size=2).map(tuple),
    texts=st.lists(st.sampled_from(["yes", "", "no " * 100]), min_size=3, max_size=3),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(GROUPS, max_size=12))
def test_what_is_read_is_used_or_left_out_for_a_reason_that_has_words(
    tokenizer: PreTrainedTokenizerBase, groups: list[RankedGroup]
) -> None:
    data = dataset(tokenizer, groups)
    rankings, prompts = data.censuses
    assert (rankings.num_learned, rankings.num_measured) == (len(data.training), len(data.held_out))
    assert (prompts.num_learned, prompts.num_measured) == (len(data.training_prompts), len(data.held_out_prompts))
    stored = [
        StoredDemonstration(seq, "d", each.sample_id, each.user_id, each.prompt, "so " * each.seq, each.first_user_id)
        for seq, each in enumerate(groups)
    ]
    chosen = choose(tokenizer, stored, held_out_share=SHARE, validation_share=0.2, max_tokens=80, max_prompt_tokens=64)
    assert chosen.census.num_learned == len(chosen.learned)
    for census in (rankings, prompts, chosen.census):
        left_out = sum(census.left_out.values())
        assert len(groups) == census.num_read == census.num_learned + census.num_measured + left_out
        assert census.figures().keys() <= METRICS.keys()


def uncompared(group: RankedGroup) -> LeftOut | None:
    return None if has_comparison(group) else LeftOut(NO_COMPARISON)


def counted(store_url: str, after: int = 0, most: int = 99) -> New:
    with closing(Store(store_url)) as store:
        return NewRankings(store, SHARE, uncompared).count(after, most)


def of_user(event: Any, user_id: str) -> Any:
    event.user_id = user_id
    return event


def test_only_rankings_that_would_be_learned_from_begin_a_run(store_url: str) -> None:
    with closing(Ledger(store_url)) as ledger, closing(Store(store_url)) as store:
        new = NewRankings(store, SHARE, uncompared)
        assert new.count(0, 99) == New(0, None)
        write_events(ledger, *(sample(f"s{n}", f"What is {n}?", user_id=LEARNED) for n in range(6)))
        write_events(ledger, sample("theirs", "a", user_id=HELD_OUT), sample("cut", "b", 2, 0, user_id=LEARNED))
        # One ranking that was sent twelve times is one.
        write_events(ledger, *(of_user(ranking(f"r{n}", "s0", time_seconds=n), LEARNED) for n in range(12)))
        found = new.count(0, 99)
        assert (found.count, found.oldest) == (1, ranking("", time_seconds=11).event_time.seconds)  # type: ignore[attr-defined]
        useless = [
            ranking("orphan", "nowhere"), ranking("held out", "s1"), ranking("of theirs", "theirs"),
            ranking("tied", "s2", order=[[0, 1, 2]]), ranking("spans", "cut", order=[[0], [1]]),
        ]  # fmt: skip
        write_events(ledger, *(of_user(each, LEARNED) for each in useless))
        write_events(ledger, of_user(ranking("by them", "s1", time_seconds=1), HELD_OUT))
        assert new.count(0, 99).count == 2  # the one of s1 counts for its other user
        # A ranking counts once its sample is there, and no longer once its user ties them.
        write_events(ledger, sample("nowhere", "c", user_id=LEARNED))
        assert new.count(0, 99).count == 3
        write_events(ledger, of_user(ranking("corrected", "s0", order=[[0, 1, 2]], time_seconds=99), LEARNED))
        assert new.count(0, 99).count == 2
        assert new.count(0, 99).left_out.keys() == {HELD_OUT_IN_PART, NO_COMPARISON}
        assert new.count(0, 1).count == 1
        assert new.count(store.last_seq(), 99) == New(0, None)


def test_a_run_in_which_everything_is_left_out_ends_and_says_why(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    asked: Any = sample("s1", user_id=LEARNED)
    asked.prompt.CopyFrom(UNRENDERED["a turn that the template refuses"])
    store_url, nobody = f"sqlite:///{tmp_path}/store.db", cast(Any, None)
    with closing(Ledger(store_url)) as ledger:
        write_events(ledger, asked, *(of_user(ranking(f"r{n}", time_seconds=n), LEARNED) for n in range(3)))
    folder = RunFolder.create(tmp_path, "run", TrainingConfig(), Origin(1, 1, 3, 1))
    client = cast(Any, SimpleNamespace(get=lambda version: version, newest=lambda count: []))
    with closing(Store(store_url)) as store, caplog.at_level("INFO"):
        context = TrainerContext(store, nobody, client, tmp_path, tokenizer, lambda run_id: None, ALONE)
        assert [run_once(context, folder) for _ in range(2)] == [True, True]
    read, stopped = read_lines(folder.path / "metrics.jsonl").found
    assert (read["rankings/read"], read["rankings/left_out/superseded"]) == (3, 2)
    assert (read["rankings/left_out/not_rendered"], read["prompts/left_out/not_rendered"]) == (1, 1)
    assert "too little to learn from: 0 rankings" in stopped["reason"]
    assert "1 of a sample that cannot be rendered" in stopped["reason"]
    assert "rankings that cannot be rendered: s1 (TemplateError: no system role)" in caplog.text


def test_a_prompt_is_rendered_as_the_server_renders_it(tokenizer: PreTrainedTokenizerBase) -> None:
    assert rendered_prompt(tokenizer, GOOD["text"]) == tuple(tokenizer.encode("Once upon"))


def test_a_census_says_nothing_of_reasons_that_left_out_nothing() -> None:
    census = Census("prompts", 3, 2, 1, {})
    assert census.figures() == {"prompts/read": 3, "prompts/learned": 2, "prompts/measured": 1}
    assert sentences(census.figures()) == ["3 prompts: 2 learned from, 1 to measure with"]
