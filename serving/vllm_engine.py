"""The engine: vLLM's AsyncLLM, with the few things that serving needs of it."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignd.v1.types_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FINISH_REASON_UNSPECIFIED, FinishReason
from policies.encoding import tokenizer_digest
from policies.end_tokens import end_tokens
from policies.process_watch import Watch
from serving.drawing import Delta, Draw, Logprob

_FINISH_REASONS: dict[str | None, FinishReason] = {
    None: FINISH_REASON_UNSPECIFIED,
    "stop": FINISH_REASON_STOP,
    "length": FINISH_REASON_LENGTH,
}
_PROBE_TOKENS = (0,)
# vLLM gives each of a request's completions the seed after the last one's, and keeps them in 63 bits.
_SEEDS = 2**62


class EngineError(Exception):
    """The engine cannot do what was asked, or is dead."""


class BadFormError(Exception):
    """vLLM cannot draw in the form that was asked for. The text says why."""


class Engine:
    """One vLLM engine with one set of weights at a time.

    Raises:
        EndTokenError: when it is made, if the model has no end token.
        EncodingError: when it is made, if its tokenizer cannot encode text safely.
    """

    def __init__(self, llm: Any, max_model_len: int) -> None:
        self._llm = llm
        self.max_model_len = max_model_len
        self.tokenizer = llm.get_tokenizer()
        # Made here, since they take seconds for large tokenizers, which no request should wait for.
        self.tokenizer_digest = tokenizer_digest(self.tokenizer)
        self._end_token_ids = list(end_tokens(self.tokenizer).token_ids)
        self.vocabulary: int = llm.model_config.get_vocab_size()
        self._watch = Watch()
        self._forms = asyncio.Lock()
        self.loading = False
        """Whether weights are being loaded, so that no request makes progress."""
        self.has_answered = False
        """Whether it has drawn anything yet: the first token may take much longer than others."""

    async def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], draw: Draw, cache_salt: str, *, stream: bool
    ) -> AsyncIterator[list[Delta]]:
        """Yields new text as it is written, or, unless `stream`, a completion's first token and the rest at its end.

        Cancelling the iteration ends the generation. `cache_salt` keeps what was cached of different weights apart.

        Raises:
            BadFormError: the JSON schema or regular expression is none, or is not supported.
            EngineError: vLLM failed, or is dead.
        """
        # Greedy completions of one prompt are all the same: one is written, and given as often as was asked.
        copies = draw.num_completions if draw.temperature == 0 else 1
        params = self._params(draw, draw.num_completions // copies, stream=stream)
        prompt = {"prompt_token_ids": list(prompt_token_ids), "cache_salt": cache_salt}
        top, has_form = draw.top_logprobs or 0, bool(draw.json_schema or draw.regex)
        try:
            async for output in self._outputs(prompt, params, request_id, has_form=has_form):
                deltas = [_delta(each, copy, top) for each in output.outputs for copy in range(copies)]
                if deltas and output.prompt_logprobs:
                    read = _prompt_logprobs(prompt_token_ids, output.prompt_logprobs, draw.prompt_logprobs or 0)
                    deltas[0] = replace(deltas[0], prompt_logprobs=read)
                yield deltas
        except KeyError as error:
            raise EngineError(f"vLLM ended a completion with {error}") from error
        except _vllm_errors() as error:
            # A form is checked before anything is drawn; a draw without one has nothing that vLLM does not take.
            if isinstance(error, _input_errors()) and (draw.json_schema or draw.regex):
                raise BadFormError(str(error)) from error
            raise EngineError(f"vLLM failed: {error}") from error

    async def _outputs(
        self, prompt: Mapping[str, Any], params: Any, request_id: str, *, has_form: bool
    ) -> AsyncIterator[Any]:
        """Yields what vLLM writes.

        It checks a form where it also takes in all other requests, and a regular expression may take it seconds. So one
        form is checked at a time, with room for others between two.
        """
        outputs = aiter(self._llm.generate(prompt, params, request_id))
        try:
            async with self._forms if has_form else nullcontext():
                first = await anext(outputs, None)
            if first is not None:
                yield first
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()

    def token_text(self, token_id: int) -> str:
        """Returns the text of a token by itself."""
        return str(self.tokenizer.decode([token_id]))

    def _params(self, draw: Draw, count: int, *, stream: bool) -> Any:
        """Returns vLLM's parameters of a draw."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        form = None
        if draw.json_schema or draw.regex:
            form = StructuredOutputsParams(json=draw.json_schema or None, regex=draw.regex or None)
        return SamplingParams(
            n=count,
            temperature=draw.temperature,
            top_p=draw.top_p,
            top_k=draw.top_k,
            min_p=draw.min_p,
            presence_penalty=draw.presence_penalty,
            frequency_penalty=draw.frequency_penalty,
            repetition_penalty=draw.repetition_penalty,
            max_tokens=draw.max_tokens,
            stop=list(draw.stop) or None,
            stop_token_ids=[] if draw.ignore_eos else self._end_token_ids,
            ignore_eos=draw.ignore_eos,
            seed=None if draw.seed is None else _spread(draw.seed),
            logprobs=draw.top_logprobs,
            prompt_logprobs=draw.prompt_logprobs,
            structured_outputs=form,
            # FINAL_ONLY would yield no completion before all have ended: nobody could tell what a swap overtook.
            output_kind=RequestOutputKind.DELTA,
            # Yielding each token takes as much of this process's time again as drawing it does.
            stream_interval=None if stream else draw.max_tokens,
        )

    async def logprobs(self, token_ids: Sequence[int], request_id: str) -> list[float]:
        """Returns the log-probability, in nats, of each token but the first, given those before it.

        Raises:
            EngineError: vLLM failed, or is dead.
        """
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        # A salt of its own, so that log-probabilities are computed and never read from a cache.
        prompt = {"prompt_token_ids": list(token_ids), "cache_salt": request_id}
        rows: Any = None
        try:
            async for output in self._llm.generate(prompt, params, request_id):
                rows = output.prompt_logprobs or rows
        except _vllm_errors() as error:
            raise EngineError(f"vLLM failed: {error}") from error
        if rows is None or len(rows) != len(token_ids):
            raise EngineError("vLLM returned no log-probabilities of the prompt")
        self.has_answered = True
        return [row[token].logprob for row, token in zip(rows[1:], token_ids[1:], strict=True)]

    async def load_weights(self, folder: Path) -> None:
        """Replaces the weights in place by those in `folder`, and drops everything computed from the old ones.

        Requests in flight pause and then continue with the new weights; the caller makes sure that there are none, or
        that they are marked.

        Raises:
            EngineError: the weights do not fit, or the engine is dead.
        """
        self.loading = True
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            try:
                await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                await self._llm.reset_prefix_cache(reset_running_requests=True)
            finally:
                await self._llm.resume_generation()
        except Exception as error:
            # vLLM passes whatever a worker raised on as a plain Exception.
            raise EngineError(f"vLLM could not load {folder.name}: {error}") from error
        finally:
            self.loading = False

    async def probe(self, request_id: str) -> None:
        """Draws one token, the least that shows that the engine works.

        Raises:
            EngineError: vLLM failed, or is dead.
        """
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0)
        try:
            async for _ in self._llm.generate({"prompt_token_ids": list(_PROBE_TOKENS)}, params, request_id):
                self.has_answered = True
        except _vllm_errors() as error:
            raise EngineError(f"vLLM failed: {error}") from error

    def num_tokens(self) -> Mapping[str, int]:
        """Returns how many tokens each completion in flight has so far, by its request's id."""
        states: Mapping[str, Any] = self._llm.output_processor.request_states
        return {name: each.detokenizer.num_output_tokens() for name, each in states.items() if each.detokenizer}

    async def check_health(self) -> None:
        """Checks that the engine is alive, and notes how much memory it has.

        Raises:
            EngineError: the engine is dead.
        """
        processes = self._llm.engine_core.resources.engine_manager.processes
        self._watch.look(*(process.pid for process in processes))
        try:
            await self._llm.check_health()
        except _vllm_errors() as error:
            endings = (self._watch.ending(each.exitcode or 0, each.pid) for each in processes)
            said = next(filter(None, endings), "is dead")
            raise EngineError(f"vLLM {said}: {error}") from error

    def shutdown(self) -> None:
        """Ends the engine's processes."""
        self._llm.shutdown()


def _delta(output: Any, copy: int, most: int) -> Delta:
    reason = _FINISH_REASONS[output.finish_reason]
    token_ids = tuple(output.token_ids)
    # Without a stop string vLLM's "stop" is an end token, which is then the last one.
    ended = reason == FINISH_REASON_STOP and not isinstance(output.stop_reason, str)
    logprobs = tuple(_logprobs(*each, most) for each in zip(token_ids, output.logprobs or (), strict=False))
    return Delta(output.index + copy, output.text, token_ids, reason, token_ids[-1] if ended else None, logprobs)


def _prompt_logprobs(
    token_ids: Sequence[int], rows: Sequence[Mapping[int, Any] | None], most: int
) -> list[Sequence[Logprob]]:
    """Returns the same of each token of a prompt. vLLM's row of the first, before which there is nothing, is None."""
    pairs = zip(token_ids, rows, strict=True)
    return [_logprobs(token_id, row, most) if row else [(token_id, 0.0)] for token_id, row in pairs]


def _logprobs(token_id: int, row: Mapping[int, Any], most: int) -> list[Logprob]:
    """Returns the log-probability of the token that was drawn, and then those of the `most` likeliest ones.

    vLLM's row has the token that was drawn in any case.
    """
    likeliest = sorted((each.rank, other, each.logprob) for other, each in row.items() if each.rank <= most)
    return [(token_id, row[token_id].logprob), *((other, logprob) for _, other, logprob in likeliest)]


def _spread(seed: int) -> int:
    """Returns vLLM's seed for ours: far from those of other seeds, which it would else share with its neighbours.

    A CPU looks only at the lowest 32 bits, so these depend on all of ours.
    """
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()) % _SEEDS


def _vllm_errors() -> tuple[type[Exception], ...]:
    """Returns what vLLM raises for failures of its own and, as ValueError, for input that it does not take."""
    from vllm.exceptions import VLLMError

    return VLLMError, ValueError


def _input_errors() -> tuple[type[Exception], ...]:
    """Returns those of them that are about the input."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError, ValueError
