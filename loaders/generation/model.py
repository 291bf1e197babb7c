"""A loaded artifact: it continues prompts and answers conversations."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

from ..artifact.errors import PrecastError
from ..artifact.manifest import Manifest, Target
from ..text.tokenizer import Tokenizer
from .engine import DecodeRow, Engine
from .sampling import Sampler
from .sampling_params import SamplingParams
from .stopping import StopStrings
from .stream import Completion, GenerationState, Stream, pieces

Message = Mapping[str, object]
Prompt = str | Sequence[int]


class Model:
    """A loaded artifact.

    Threads may share a model: each generation has its own KV cache. A step uses all threads of the device, so
    concurrent generations share its speed.

    Attributes:
        manifest: the artifact's manifest.
        target: the target that runs.
        compiles: number of programs compiled while loading: 0 unless compiling from StableHLO was requested.
        tokenizer: the model's tokenizer.
        eos_token_ids: tokens that end a generation.
    """

    def __init__(
        self, *, engine: Engine, tokenizer: Tokenizer, manifest: Manifest, target: Target, compiles: int
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.target = target
        self.compiles = compiles
        self.eos_token_ids = frozenset(manifest.tokenizer.eos_token_ids)

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
            PrecastError: the prompt is empty, fills the context, or contains ids outside the vocabulary; or the
                artifact's weights were written to since loading.
        """
        return self.stream(prompt, params).finish()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continue a prompt as `generate` does, piece by piece.

        The prompt is checked at once. The computation starts when the first piece is read.
        """
        if isinstance(prompt, bytes | bytearray):
            raise PrecastError("prompt: expected text or token ids, found bytes; decode them first.")
        if not isinstance(prompt, str) and not hasattr(prompt, "__len__"):
            raise PrecastError(f"prompt: expected text or token ids, found {type(prompt).__name__}.")
        if params is not None and not isinstance(params, SamplingParams):
            raise PrecastError(f"params: expected SamplingParams, found {type(params).__name__}.")
        # Empty text counts as no tokens, even if the tokenizer adds a special one.
        ids = prompt if not isinstance(prompt, str) else self.tokenizer.encode(prompt) if prompt else ()
        return self._new_stream(self._checked_prompt(ids), params or self.default_sampling())

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        literal: bool = False,
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: mappings with "role" and "content", oldest first.
            params: the sampling parameters; None uses the model's own defaults.
            tools: JSON schemas of functions, for templates that support them.
            template: name of one of the model's chat templates ("rag"); None chooses as `Tokenizer.render_chat` does.
            literal: encode messages and tools as plain text, so that special tokens spelt in them cannot forge a turn.

        Raises:
            PrecastError: the model has no such chat template, or the template rejects the messages; also as
                `generate`.
        """
        return self.stream_chat(messages, params, tools=tools, template=template, literal=literal).finish()

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        literal: bool = False,
    ) -> Stream:
        """Answer a conversation as `chat` does, piece by piece."""
        return self.stream(
            self.chat_prompt(messages, tools=tools, template=template, literal=literal), params
        )

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        literal: bool = False,
    ) -> list[int]:
        """Return the token ids of a conversation's prompt; the arguments are those of `chat`."""
        from ..text.chat_messages import ChatOptions

        options = ChatOptions(tools=tools)
        return self.tokenizer.encode_chat(messages, options, template=template, literal=literal)

    def _checked_prompt(self, ids: Sequence[int]) -> list[int]:
        context, vocab = self.engine.context, self.engine.vocab
        if len(ids) == 0:
            raise PrecastError("prompt: expected at least one token, found none; give the model some text.")
        if len(ids) >= context:
            raise PrecastError(
                f"prompt: {len(ids)} tokens leave no room in a context of {context}; shorten it to {context - 1}"
                " or fewer, or export with a larger --context."
            )
        for i, token in enumerate(ids):
            # Accept NumPy's integers; int() would silently accept fractions and booleans.
            is_integer = isinstance(token, Integral) and not isinstance(token, bool)
            if not is_integer or not 0 <= token < vocab:
                raise PrecastError(
                    f"prompt: token {i} is {token!r:.40}, expected an id from 0 to {vocab - 1}{self._advice(token)}."
                )
        return [int(token) for token in ids]

    def _advice(self, token: object) -> str:
        """Return the remedy for a token that the tokenizer knows and the model lacks; transformers fails on it too."""
        if not isinstance(token, Integral) or int(token) < self.engine.vocab:
            return ""
        text = self.tokenizer.token(int(token))
        return "" if text is None else f"; leave out {text!r:.40}, for which the model has no embedding"

    def _new_stream(self, prompt: Sequence[int], params: SamplingParams) -> Stream:
        params = params.with_word_ids(partial(self.tokenizer.encode, add_special_tokens=False))
        limit = params.limit(len(prompt), self.engine.context - len(prompt))
        state = GenerationState()
        ends = params.ends(self.eos_token_ids)
        decoder, stops = self.tokenizer.stream(), StopStrings(params.stop)
        text = pieces(partial(self._tokens, prompt, params, limit), decoder, stops, ends, state)
        return Stream(text, prompt, state)

    def _tokens(self, prompt: Sequence[int], params: SamplingParams, limit: int) -> Iterator[int]:
        """Yield at most `limit` generated ids."""
        sampler = Sampler(params, prompt, self.engine.vocab, self.eos_token_ids, self.tokenizer.token_text)
        # Each generation has its own cache, so that streams of one model are independent.
        cache = self.engine.new_cache()
        step = self.engine.prefill(prompt, cache)
        for position in range(len(prompt), len(prompt) + limit):
            token = int(step.token[0]) if sampler.is_greedy else sampler.sample(self.engine.logits(step)[0])
            yield token
            if position + 1 < len(prompt) + limit:
                step = self.engine.decode([DecodeRow(0, token, position)], cache)
