"""A store of either kind, and the ledger that writes it."""

from collections.abc import Iterator

import pytest

from feedback.store.ledger import Ledger
from feedback.store.reader import Store


@pytest.fixture
def ledger(store_url: str) -> Iterator[Ledger]:
    opened = Ledger(store_url)
    yield opened
    opened.close()


@pytest.fixture
def store(ledger: Ledger, store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    yield opened
    opened.close()
