"""Writes events to a store's ledger as an ingest does, and reads its dead letters."""

from collections.abc import Sequence

from google.protobuf.message import Message

from feedback.bus.contract import Delivered
from feedback.store.ledger import Ledger, Offset
from tests.feedback.events import KEYRING, delivered


def write(ledger: Ledger, batch: Sequence[Delivered], log_id: str = "log") -> int:
    """Writes a batch, like an ingest that has just read the offsets."""
    after = {(each.position.topic, each.position.partition): Offset(log_id, each.position.offset + 1) for each in batch}
    return ledger.write(batch, ledger.offsets(), after, KEYRING)


def write_events(ledger: Ledger, *events: Message) -> int:
    return write(ledger, [delivered(event, offset) for offset, event in enumerate(events)])


def unpublished(ledger: Ledger) -> list[tuple[str, bytes]]:
    return ledger.unpublished_dead_letters(100)
