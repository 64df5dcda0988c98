"""Which prompts count as the same one, also where a store has older digests."""

import unicodedata
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from alignd.v1 import types_pb2
from feedback.store.engine import open_engine
from feedback.store.ledger import Ledger
from feedback.store.prompt_identity import prompt_identity
from feedback.store.reader import Store
from feedback.store.tables import SAMPLES
from tests.feedback.events import chat, sample
from tests.feedback.store.writing import write_events


def text(content: str) -> types_pb2.Prompt:
    return types_pb2.Prompt(text=content)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (text("rice?"), text(" rice?\n"), True),
        (text("one two"), text("one \t\u00a0two"), True),
        (text("caf\u00e9"), text("cafe\u0301"), True),
        (text("us"), text("US"), False),
        (text("A\nB\nC"), chat("A", "B", "C"), False),
        (text("rice?"), chat("rice?"), False),
        (chat("A", "B", "C"), chat("A ", "B", " C"), True),
        (chat("A", "B", "C"), chat("A", "B C"), False),
        (chat("A", "", "C"), chat("A", "C"), False),
        (text(""), types_pb2.Prompt(), True),
        (text("[]"), chat(), False),
    ],
)
def test_turns_and_roles_decide_and_white_space_does_not(
    one: types_pb2.Prompt, other: types_pb2.Prompt, same: bool
) -> None:
    assert (prompt_identity(one) == prompt_identity(other)) == same


def test_the_role_counts() -> None:
    said = [
        types_pb2.Prompt(chat=types_pb2.Chat(messages=[types_pb2.Message(role=role, content="A")]))
        for role in (types_pb2.ROLE_USER, types_pb2.ROLE_SYSTEM, 99)
    ]
    assert len({prompt_identity(each) for each in said}) == 3


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_spaces_around_and_another_composition_never_make_another_prompt(content: str) -> None:
    written = f" {unicodedata.normalize('NFD', content)}\n"
    assert prompt_identity(text(written)) == prompt_identity(text(content))


def test_a_store_of_an_earlier_release_tells_prompts_apart_as_a_new_one_does(store_url: str) -> None:
    with closing(Ledger(store_url)) as ledger:
        write_events(ledger, sample("s1", "rice?"), sample("s2", "rice? "))
    engine = open_engine(store_url)
    with engine.begin() as connection:
        kept = connection.execute(select(SAMPLES.c.prompt_digest)).scalars().all()
        connection.exec_driver_sql("DROP INDEX samples_first")
        added = {"trainer": ("lease_us", "process"), "offsets": ("last_digest", "num_losses")}
        for table, column in ((table, column) for table, columns in added.items() for column in columns):
            connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {column}")
        for number, digest in enumerate((b"one", b"other"), start=1):
            connection.execute(SAMPLES.update().where(SAMPLES.c.seq == number).values(prompt_digest=digest))
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0002'")
    engine.dispose()
    with closing(Store(store_url)) as store:
        assert [each.sample_id for each in store.prompts(9)] == ["s2"]
    engine = open_engine(store_url)
    with engine.connect() as connection:
        assert connection.execute(select(SAMPLES.c.prompt_digest)).scalars().all() == kept
    engine.dispose()
