"""What a client has yet to be sent of a stream. New text joins that before it, so reading slowly delays no drawing."""

import asyncio

from alignd.v1 import inference_service_pb2
from alignd.v1.types_pb2 import FinishReason
from serving.drawing import Delta
from serving.sampler import as_deltas


class Unread:
    """The start of a sample, and the text of its completions, from the task that draws to the one that sends.

    It holds at most the completions' text once, however long nobody reads.
    """

    def __init__(self) -> None:
        self._started: inference_service_pb2.SampleStarted | None = None
        self._texts: dict[int, list[str]] = {}
        self._reasons: dict[int, FinishReason] = {}
        self._changed = asyncio.Event()

    def start(self, sample_id: str) -> None:
        """Adds the first message of the stream."""
        self._started = inference_service_pb2.SampleStarted(sample_id=sample_id)
        self._changed.set()

    def add(self, delta: Delta) -> None:
        """Adds new text of one completion."""
        self._texts.setdefault(delta.index, []).append(delta.text)
        self._reasons[delta.index] = delta.finish_reason
        self._changed.set()

    def end(self) -> None:
        """Says that nothing more will come."""
        self._changed.set()

    async def wait(self) -> None:
        """Returns when there is something to send, or nothing more will come."""
        await self._changed.wait()
        self._changed.clear()

    def take(self) -> list[inference_service_pb2.StreamSampleResponse]:
        """Returns what is to be sent, and forgets it."""
        messages = []
        if self._started:
            messages.append(inference_service_pb2.StreamSampleResponse(started=self._started))
            self._started = None
        if self._texts:
            texts = {index: "".join(parts) for index, parts in self._texts.items()}
            messages.append(inference_service_pb2.StreamSampleResponse(deltas=as_deltas(texts, self._reasons)))
            self._texts, self._reasons = {}, {}
        return messages
