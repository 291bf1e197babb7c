"""A loaded artifact, which continues prompts and answers conversations."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from ..artifact.errors import PrecastError, PromptTooLongError
from ..artifact.manifest import Manifest, Target
from ..text.tokenizer import Tokenizer
from .engine import Engine
from .sampling import Sampler
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .sequence import UNREAD_PIECES, TokenSequence
from .stopping import StopStrings
from .stream import Completion, Stream

if TYPE_CHECKING:
    from ..text.answer_parser import AnswerParser
    from .chats import ChatForm
    from .constraint_texts import ConstraintText
    from .constraints import Constraint
    from .grammars import Grammars
    from .logprobs import PromptLogprobs
    from .prefixes import PrefixTree
    from .state_file import State

Message = Mapping[str, object]
Prompt = str | Sequence[int]


class _Request(NamedTuple):
    """A checked prompt, its sampling parameters, the maximum number of tokens to generate, and the constraint."""

    ids: list[int]
    params: SamplingParams
    limit: int
    constraint: "ConstraintText | None"


class Model:
    """A loaded artifact.

    Threads may share a model. Concurrent generations advance together, each in a slot of a KV cache. If all slots are
    taken, the model creates another KV cache. While nothing is being generated, the model keeps at most one KV cache,
    of at most 128 MiB.

    Attributes:
        engine: the engine that runs the target's programs.
        scheduler: the scheduler of the generations in progress.
        prefixes: keys and values of earlier prompts. None for a target whose keys and values depend on how a prompt is
            split into chunks, because such keys and values are never reused.
        manifest: the artifact's manifest.
        target: the target whose programs run.
        compiles: number of programs compiled while loading; above 0 only if compiling from StableHLO was allowed.
        tokenizer: the model's tokenizer.
        eos_token_ids: tokens that end a generation.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        tokenizer: Tokenizer,
        manifest: Manifest,
        target: Target,
        compiles: int,
        prefixes: "PrefixTree | None" = None,
    ) -> None:
        self.engine = engine
        self.prefixes = prefixes
        self.scheduler = Scheduler(engine, prefixes=prefixes)
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.target = target
        self.compiles = compiles
        self.eos_token_ids = frozenset(manifest.tokenizer.eos_token_ids)
        # precast's kernels compute the same bits in every program.
        self._verifies_exactly = bool(target.kernels)
        self._grammars: Grammars | None = None
        self._grammars_lock = Lock()

    def default_sampling(self) -> SamplingParams:
        """Return the model's own sampling defaults, or greedy decoding if it has none.

        Raises:
            PrecastError: a default in the artifact is out of range.
        """
        return dataclasses.replace(SamplingParams(), **self.manifest.sampling.given())

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """Continue a prompt.

        Args:
            prompt: text, or token ids.
            params: the sampling parameters; None uses the model's own defaults.

        Raises:
            PrecastError: the prompt is empty, fills the context, or contains ids outside the vocabulary; or the weight
                file was modified after loading.
        """
        return self.stream(prompt, params).finish()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continue a prompt as `generate` does, piece by piece.

        The prompt is checked at once. The computation starts when the first piece is read.
        """
        return Stream(self.scheduler, self._sequence(self._request(prompt, params)))

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
    ) -> list[Completion]:
        """Continue several prompts together, as many at a time as a KV cache has slots.

        All prompts are checked before the model reads the first prompt.

        Args:
            prompts: the prompts, each as text or token ids.
            params: one set of sampling parameters for all prompts, or one for each; None uses the model's own defaults.

        Returns:
            The completions in the order of the prompts.

        Raises:
            PrecastError: the number of sets of parameters differs from the number of prompts, or a prompt causes an
                error of `generate`. In the second case, the message contains the prompt's index, and all other
                generations end.
        """
        from . import together

        requests = []
        for index, (prompt, chosen) in enumerate(together.pairs(prompts, params)):
            try:
                requests.append(self._request(prompt, chosen))
            except PrecastError as error:
                raise together.at(index, error) from None
        sequences = (partial(self._sequence, request, most_unread=None) for request in requests)
        found: dict[int, Completion] = {}
        for index, result in together.results(self.scheduler, sequences, self.engine.slots):
            if isinstance(result, PrecastError):
                raise together.at(index, result) from result
            found[index] = result
        return [found[index] for index in range(len(requests))]

    def generate_each(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams | None] | None = None,
    ) -> Iterator[tuple[int, Completion | PrecastError]]:
        """Continue any number of prompts together, and yield each result as soon as it is complete.

        The next prompt is taken from the iterable when a slot of the KV cache becomes free. If a prompt fails, its
        result is the error, and the other prompts continue.

        Args:
            prompts: the prompts, each as text or token ids.
            params: one set of sampling parameters for all prompts, or one for each; None uses the model's own defaults.

        Yields:
            The index of the prompt, and its completion or error.

        Raises:
            PrecastError: `prompts` is a single string, or `prompts` and `params` are sequences of different lengths.
        """
        from . import together

        def make(prompt: Prompt, chosen: SamplingParams | None) -> TokenSequence:
            return self._sequence(self._request(prompt, chosen), most_unread=None)

        sequences = (partial(make, *pair) for pair in together.pairs(prompts, params))
        return together.results(self.scheduler, sequences, self.engine.slots)

    def generate_answers(
        self, prompt: Prompt, count: int, params: SamplingParams | None = None
    ) -> list[Completion]:
        """Generate several answers to one prompt together.

        With a seed, the first answer uses that seed, the next one uses seed + 1, and so on, as with vLLM's `n`.

        Args:
            prompt: text, or token ids.
            count: number of answers, at least 1.
            params: the sampling parameters; None uses the model's own defaults. All greedy answers are identical.

        Raises:
            PrecastError: the count is below 1; also the errors of `generate`.
        """
        from . import together

        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else prompt

        def make(chosen: SamplingParams) -> TokenSequence:
            return self._sequence(self._request(ids, chosen), most_unread=None)

        return together.answers(
            self.scheduler, make, count, params or self.default_sampling(), self.engine.slots
        )

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        literal: bool = False,
        answer_format: str | None = None,
        tool_choice: str = "auto",
        template_variables: Mapping[str, Any] | None = None,
    ) -> Completion:
        """Answer a conversation.

        If the model reasons, a constraint (of the parameters or of `tool_choice`) applies after the reasoning. If the
        prompt turns reasoning off, or `answer_format` is "text", the constraint applies from the first token.

        Args:
            messages: mappings with "role" and "content", oldest first.
            params: the sampling parameters; None uses the model's own defaults.
            tools: JSON schemas of functions in OpenAI's form, for templates that support them.
            template: name of one of the model's chat templates, such as "rag"; None chooses as `Tokenizer.render_chat`
                does.
            literal: encode messages and tools as plain text, so that special tokens spelt in them cannot forge a turn.
            answer_format: the model family that defines the syntax of tool calls in the answer ("hermes", "llama3",
                "mistral", …). "text" leaves reasoning and tool calls in the text. None lets the chat template decide.
            tool_choice: "auto" leaves the choice to the model. "required" restricts the answer to tool calls, and a
                tool's name restricts the answer to calls of that tool. Both restrictions enforce the tools' schemas,
                and need the extra `grammar`.
            template_variables: further variables of the chat template, such as ``{"enable_thinking": False}``.

        Raises:
            PrecastError: the model has no such chat template, the template rejects the messages, a tool is malformed,
                the answer format is unknown, the tool choice names no tool or cannot be enforced, or a variable's name
                is reserved or its value is not JSON; also the errors of `generate`.
        """
        return self.stream_chat(
            messages,
            params,
            tools=tools,
            template=template,
            literal=literal,
            answer_format=answer_format,
            tool_choice=tool_choice,
            template_variables=template_variables,
        ).finish()

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        literal: bool = False,
        answer_format: str | None = None,
        tool_choice: str = "auto",
        template_variables: Mapping[str, Any] | None = None,
    ) -> Stream:
        """Answer a conversation as `chat` does, piece by piece."""
        from . import chats

        form = chats.chat_form(tools, template, literal, answer_format, tool_choice, template_variables)
        (stream,) = self.stream_chat_answers(messages, [params], form)
        return stream

    def stream_chat_answers(
        self, messages: Sequence[Message], params: Iterable[SamplingParams | None], form: "ChatForm"
    ) -> list[Stream]:
        """Return a stream for each set of sampling parameters; the conversation is tokenised once."""
        make = self._chat_maker(messages, form, most_unread=UNREAD_PIECES)
        return [Stream(self.scheduler, make(chosen)) for chosen in params]

    def chat_each(
        self,
        conversations: Iterable[Sequence[Message]],
        params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        literal: bool = False,
        answer_format: str | None = None,
        tool_choice: str = "auto",
        template_variables: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[int, Completion | PrecastError]]:
        """Answer any number of conversations together, as `generate_each` does for prompts; arguments as for `chat`."""
        from . import chats, together

        form = chats.chat_form(tools, template, literal, answer_format, tool_choice, template_variables)

        def make(messages: Sequence[Message], chosen: SamplingParams | None) -> TokenSequence:
            return self._chat_maker(messages, form, most_unread=None)(chosen)

        sequences = (partial(make, *pair) for pair in together.pairs(conversations, params))
        return together.results(self.scheduler, sequences, self.engine.slots)

    def chat_answers(
        self,
        messages: Sequence[Message],
        count: int,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        literal: bool = False,
        answer_format: str | None = None,
        tool_choice: str = "auto",
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """Generate several answers to a conversation; arguments and errors as for `chat` and `generate_answers`."""
        from . import chats, together

        form = chats.chat_form(tools, template, literal, answer_format, tool_choice, template_variables)
        make = self._chat_maker(messages, form, most_unread=None)
        return together.answers(
            self.scheduler, make, count, params or self.default_sampling(), self.engine.slots
        )

    def _chat_maker(
        self, messages: Sequence[Message], form: "ChatForm", *, most_unread: int | None
    ) -> Callable[[SamplingParams | None], TokenSequence]:
        """Tokenise a conversation, and return a function that makes a sequence for one answer to it."""
        from . import chats  # lazily, because few prompts are chats

        ids = self.chat_prompt(
            messages,
            tools=form.tools,
            template=form.template,
            literal=form.literal,
            template_variables=form.template_variables,
        )

        def make(params: SamplingParams | None) -> TokenSequence:
            parser = chats.parser_of(self.tokenizer, ids, form)
            request = self._request(
                ids, params, lambda chosen: chats.constraint_of(chosen, parser, self.tokenizer, ids, form)
            )
            return self._sequence(request, most_unread=most_unread, parser=parser)

        return make

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        literal: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation's prompt; the arguments are those of `chat`."""
        from ..text.chat_messages import ChatOptions

        options = ChatOptions(tools=tools, variables=template_variables)
        return self.tokenizer.encode_chat(messages, options, template=template, literal=literal)

    def save_state(
        self, path: str | Path, sequence: Completion | Sequence[int], *, messages: Sequence[Message] = ()
    ) -> None:
        """Save a sequence's keys and values to a file, so that another process need not compute them again.

        Args:
            path: the file to create or to replace; only the current user may read it.
            sequence: a completion, or token ids. Keys and values that are no longer in memory are computed again.
            messages: the messages of the chat, including the answer; `load_state` returns them.

        Raises:
            PrecastError: the target cannot reuse keys and values, a message is malformed, the file cannot be written,
                or the sequence is empty, fills the context, or contains ids outside the vocabulary.
        """
        from . import states

        states.save(self, Path(path), sequence, messages)

    def load_state(self, path: str | Path) -> "State":
        """Load a state that `save_state` wrote.

        Later prompts that begin with the state's tokens reuse the state's keys and values.

        Returns:
            The tokens and messages of the state.

        Raises:
            PrecastError: the file is damaged or is not a state, or the state was computed with other weights, another
                type of KV cache, another tokenizer, another target or another instruction set.
        """
        from . import states

        return states.load(self, Path(path))

    def checked_prompt(self, ids: Sequence[int]) -> list[int]:
        """Check the tokens of a prompt, and return them as Python integers.

        Raises:
            PrecastError: the prompt is empty, fills the context, or contains ids outside the vocabulary.
        """
        context, vocab = self.engine.context, self.engine.vocab
        if len(ids) == 0:
            raise PrecastError("prompt: expected at least one token, found none; give the model some text.")
        if len(ids) >= context:
            raise PromptTooLongError(
                f"prompt: {len(ids)} tokens leave no room in a context of {context}; shorten it to {context - 1}"
                " or fewer, or export with a larger --context."
            )
        for i, token in enumerate(ids):
            # Accept NumPy's integers; int() would silently accept fractions and booleans.
            is_integer = isinstance(token, Integral) and not isinstance(token, bool)
            if not is_integer or not 0 <= token < vocab:
                raise PrecastError(
                    f"prompt: expected token ids from 0 to {vocab - 1}, found {token!r:.40} at index"
                    f" {i}{self._advice(token)}."
                )
        return [int(token) for token in ids]

    def _advice(self, token: object) -> str:
        """Return the remedy for a token that the tokenizer knows but the model lacks; empty for other tokens."""
        if not isinstance(token, Integral) or int(token) < self.engine.vocab:
            return ""
        text = self.tokenizer.token(int(token))
        return "" if text is None else f"; leave out {text!r:.40}, for which the model has no embedding"

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        constraint_of: "Callable[[SamplingParams], ConstraintText | None]" = attrgetter("constraint"),
    ) -> _Request:
        """Check a prompt, its parameters and the answer's constraint, and return them as a request."""
        if isinstance(prompt, bytes | bytearray):
            raise PrecastError("prompt: expected text or token ids, found bytes; decode them first.")
        if not isinstance(prompt, str) and not hasattr(prompt, "__len__"):
            raise PrecastError(f"prompt: expected text or token ids, found {type(prompt).__name__}.")
        if params is not None and not isinstance(params, SamplingParams):
            raise PrecastError(f"params: expected SamplingParams, found {type(params).__name__}.")
        # Empty text counts as no tokens, even if the tokenizer adds a special token to it.
        ids = prompt if not isinstance(prompt, str) else self.tokenizer.encode(prompt) if prompt else ()
        checked, chosen = self.checked_prompt(ids), params or self.default_sampling()
        limit = chosen.limit(len(checked), self.engine.context - len(checked))
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        constraint = constraint_of(chosen)
        self._constraint(constraint)  # refuse an invalid constraint before the model reads any prompt
        return _Request(checked, chosen.with_word_ids(encode), limit, constraint)

    def _sequence(
        self,
        request: _Request,
        *,
        most_unread: int | None = UNREAD_PIECES,
        parser: "AnswerParser | None" = None,
    ) -> TokenSequence:
        prompt, params, limit, constraint = request
        return TokenSequence(
            prompt,
            sampler=Sampler(
                params,
                prompt,
                self.engine.vocab,
                self.eos_token_ids,
                self.tokenizer.token_text,
                self._constraint(constraint),
            ),
            decoder=self.tokenizer.stream(shown=() if parser is None else parser.markers),
            stops=StopStrings(params.stop),
            ends=params.ends(self.eos_token_ids),
            limit=limit,
            timeout_s=params.timeout_s,
            most_unread=most_unread,
            wants_drafts=params.prompt_lookup and self._verifies_exactly,
            echo=self.tokenizer.decode(prompt) if params.echo else "",
            prompt_logprobs=self._prompt_logprobs(prompt, params.prompt_logprobs),
            parser=parser,
        )

    def _constraint(self, text: "ConstraintText | None") -> "Constraint | None":
        """Return a constraint for a new answer. Build its grammar if the grammar is not cached."""
        if text is None:
            return None
        with self._grammars_lock:
            if self._grammars is None:
                # A lazy import, because few answers are constrained.
                from .grammars import Grammars

                self._grammars = Grammars(self.tokenizer, self.engine.vocab, self.eos_token_ids)
        return self._grammars.start(text)

    def _prompt_logprobs(self, prompt: Sequence[int], top: int | None) -> "PromptLogprobs | None":
        if top is None:
            return None
        from .logprobs import PromptLogprobs

        return PromptLogprobs(prompt, top, self.tokenizer.token_text)
