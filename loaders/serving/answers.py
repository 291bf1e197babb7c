"""Answers of a model to one request: any number of streams, read together."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..artifact.errors import PrecastError, PromptTooLongError
from ..artifact.frozen import Frozen
from ..generation.sampling_params import SamplingParams
from ..text.answer_parser import ToolCallDelta
from .errors import ApiError
from .metrics import Metrics
from .openai.response_store import ResponseStore
from .pool import Pool
from .preparing import Preparing
from .requests import Arriving, Request, timed_out
from .settings import ServeSettings

if TYPE_CHECKING:
    from ..generation.chats import ChatForm
    from ..generation.model import Message, Model, Prompt
    from ..generation.stream import Completion, Stream
    from ..text.answer_parser import Delta

_Result = TypeVar("_Result")
# Maximum number of deltas that wait for their reader, over all answers of a request.
_UNREAD = 64
# Maximum number of characters of a model's name in the log: the name may be any text of the client's.
_SHOWN = 200


class Ask(Frozen):
    """The work that a request asks of a model: answers to prompts, or to a chat.

    Attributes:
        model: the model's name.
        fields: sampling parameters that differ from the model's own defaults.
        count: number of answers to each prompt.
        prompts: the prompts; None for a chat.
        messages: the messages of the chat.
        tools: the tools that the model may call.
        tool_choice: as for `Model.chat`.
        strict: names of the tools whose schemas apply to calls even if the model is free to call tools.
        is_single_call: True if an answer ends after its first tool call.
        template_variables: further variables of the chat template.
    """

    model: str
    fields: Mapping[str, Any]
    count: int = 1
    prompts: "Sequence[Prompt] | None" = None
    messages: "Sequence[Message]" = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str = "auto"
    strict: frozenset[str] = frozenset()
    is_single_call: bool = False
    template_variables: Mapping[str, Any] | None = None

    @property
    def answers(self) -> int:
        """The number of answers."""
        return self.count * (1 if self.prompts is None else len(self.prompts))


class Services(Frozen):
    """The parts of a server that handlers use.

    Attributes:
        settings: the settings.
        pool: the models.
        preparing: the threads that check requests, render chat templates and tokenise.
        metrics: the metrics.
        responses: the responses that later ones may continue.
        arriving: the memory of bodies that have not arrived completely.
        address: the address on which the server listens.
    """

    settings: ServeSettings
    pool: Pool
    preparing: Preparing
    metrics: Metrics
    responses: ResponseStore
    arriving: Arriving
    address: str

    async def prepare(self, request: Request, work: Callable[[], _Result]) -> _Result:
        """Call a function in a thread, so that it does not block the event loop.

        Raises:
            ApiError: too many calls wait, or the request's deadline passes first.
        """
        try:
            async with asyncio.timeout(request.seconds_left):
                return await self.preparing.run(work)
        except TimeoutError:
            raise timed_out() from None

    @asynccontextmanager
    async def lease(self, request: Request, name: str, answers: int = 0) -> "AsyncIterator[Model]":
        """Lease a model as `Pool.lease` does; raise an error if the request's deadline passes first."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(request.seconds_left):
                    model = await stack.enter_async_context(self.pool.lease(name, answers))
            except TimeoutError:
                raise timed_out() from None
            yield model


class Answers:
    """The answers to one request while they are generated.

    Args:
        model: the model.
        streams: the answers.
        is_single_call: True if an answer ends after its first tool call.

    Attributes:
        model: the model.
        streams: the answers; all answers to the first prompt come first.
        failure: the error that ended an answer; None without one.
    """

    def __init__(self, model: "Model", streams: "Sequence[Stream]", *, is_single_call: bool) -> None:
        self.model, self.streams, self._is_single_call = model, streams, is_single_call
        self.failure: Exception | None = None
        self._running = set(range(len(streams)))

    async def deltas(self) -> "AsyncIterator[tuple[int, Delta | None]]":
        """Yield the pieces of all answers as they arrive: the answer's index, and the piece or None at the end.

        Raises:
            ApiError: an answer failed, or took too long.
        """
        pieces = [_to_first_call(s) if self._is_single_call else s.aevents() for s in self.streams]
        source = _one(pieces[0]) if len(pieces) == 1 else _merged(pieces)
        try:
            async for index, delta in source:
                if delta is None:
                    self._running.discard(index)
                    if self.completion(index).finish_reason == "timeout":
                        raise timed_out()
                yield index, delta
        except ApiError:
            raise
        except Exception as error:
            # The message may name files of the server, so only the log has it.
            self.failure = error
            raise ApiError(
                500, "The answer failed; the server's log gives the reason.", code="internal_error"
            ) from error

    async def completions(self) -> "list[Completion]":
        """Wait until all answers are complete, and return them; errors as for `deltas`."""
        async for _ in self.deltas():
            pass
        return self.so_far()

    def completion(self, index: int = 0) -> "Completion":
        """Return the result so far of an answer."""
        found = self.streams[index].completion
        is_cut = self._is_single_call and found.tool_calls and found.finish_reason == "unfinished"
        return replace(found, finish_reason="tool_calls") if is_cut else found

    def so_far(self) -> "list[Completion]":
        """Return the results so far of all answers."""
        return [self.completion(index) for index in range(len(self.streams))]

    async def close(self) -> None:
        """End the answers that are still being generated, and free their slots."""
        await asyncio.gather(*(self.streams[index].aclose() for index in self._running))


@asynccontextmanager
async def answering(services: Services, request: Request, ask: Ask) -> AsyncIterator[Answers]:
    """Yield the answers to a request; cancel unfinished answers when the block ends.

    Raises:
        ApiError: the request does not suit the model, the queue is full, or the model does not load.
    """
    request.facts["model"] = ask.model[:_SHOWN]
    async with services.lease(request, ask.model, ask.answers) as model:
        work = partial(_streams, model, ask, services.settings, request)
        streams = await _checked(services.prepare(request, work), ask)
        answers = Answers(model, streams, is_single_call=ask.is_single_call)
        try:
            yield answers
        finally:
            await asyncio.shield(answers.close())
            done = answers.so_far()
            request.facts.update(_facts(done))
            if answers.failure is not None:
                request.facts["error"] = repr(answers.failure)
            services.metrics.observe(ask.model, done)


async def _checked(work: Awaitable[_Result], ask: Ask) -> _Result:
    """Wait for the preparation of a request.

    Raises:
        ApiError: the request does not suit the model.
    """
    try:
        return await work
    except PromptTooLongError as error:
        param = "messages" if ask.prompts is None else "prompt"
        raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None
    except PrecastError as error:
        raise ApiError(400, str(error).removeprefix("Sampling parameters: ")) from None
    except RecursionError:
        raise ApiError(400, "The request must be nested less deeply.") from None


def _streams(model: "Model", ask: Ask, settings: ServeSettings, request: Request) -> "list[Stream]":
    """Check a request, and return a stream for each answer. A stream starts generating at its first read.

    Raises:
        PrecastError: the request does not suit the model.
        ApiError: the request's deadline has passed.
    """
    params = sampling_of(model, ask.fields, settings, request.seconds_left)
    # Once for all answers.
    params = params.with_word_ids(partial(model.tokenizer.encode, add_special_tokens=False))
    if ask.prompts is None:
        streams = model.stream_chat_answers(ask.messages, params.for_answers(ask.count), _form(ask, settings))
    else:
        prompts = [_tokenised(model, prompt) for prompt in ask.prompts]
        pairs = [(prompt, each) for prompt in prompts for each in params.for_answers(ask.count)]
        streams = [model.stream(prompt, each) for prompt, each in pairs]
    for stream in streams:
        stream.end_within(request.seconds_left)  # preparation may have taken seconds
    return streams


def _tokenised(model: "Model", prompt: "Prompt") -> "Prompt":
    """Return the token ids of a prompt, so that several answers need not tokenise it again."""
    return model.tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else prompt


def _form(ask: Ask, settings: ServeSettings) -> "ChatForm":
    from ..generation.chats import chat_form

    return chat_form(
        ask.tools,
        None,
        settings.literal,
        settings.answer_format,
        ask.tool_choice,
        ask.template_variables,
        ask.strict,
    )


def sampling_of(
    model: "Model", fields: Mapping[str, Any], settings: ServeSettings, timeout_s: float
) -> SamplingParams:
    """Return a request's sampling parameters.

    Raises:
        PrecastError: a parameter is out of range, or exceeds the server's limit.
    """
    params = replace(model.default_sampling(), **fields, timeout_s=timeout_s)
    if (most := settings.max_tokens) is None:
        return params
    if (params.max_tokens or 0) > most:
        raise PrecastError(
            f"max_tokens: expected at most {most} (the server's limit), found {params.max_tokens}."
        )
    return params if params.max_tokens is not None else replace(params, max_tokens=most)


async def _to_first_call(stream: "Stream") -> "AsyncIterator[Delta]":
    """Yield the pieces of an answer, and end the answer after its first tool call."""
    async for delta in stream.aevents():
        yield delta
        if isinstance(delta, ToolCallDelta):
            await stream.aclose()


async def _one(pieces: "AsyncIterator[Delta]") -> "AsyncIterator[tuple[int, Delta | None]]":
    async for delta in pieces:
        yield 0, delta
    yield 0, None


async def _merged(answers: "Sequence[AsyncIterator[Delta]]") -> "AsyncIterator[tuple[int, Delta | None]]":
    """Yield the pieces of several answers in the order of their arrival."""
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(_UNREAD)

    async def read(index: int, pieces: "AsyncIterator[Delta]") -> None:
        try:
            async for delta in pieces:
                await queue.put((index, delta))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    readers = [asyncio.create_task(read(*pair)) for pair in enumerate(answers)]
    try:
        left = len(readers)
        while left:
            index, found = await queue.get()
            if isinstance(found, Exception):
                raise found
            left -= found is None
            yield index, found
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def reasoning_tokens(done: "Completion", model: "Model") -> int:
    """Return the number of tokens in an answer's reasoning."""
    found = len(model.tokenizer.encode(done.reasoning, add_special_tokens=False)) if done.reasoning else 0
    return min(found, len(done.token_ids))


def _facts(done: "Sequence[Completion]") -> dict[str, Any]:
    """Return the facts about answers for the log."""
    return {
        "prompt_tokens": sum(len(c.prompt_token_ids) for c in done),
        "completion_tokens": sum(len(c.token_ids) for c in done),
        "finish_reasons": [c.finish_reason for c in done],
    }
