"""Save the state of a sequence to a file, and load it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from precast import kernels

from ..artifact.errors import PrecastError
from ..artifact.origin import Origin, is_reproducible, origin_of
from ..text.chat_messages import plain_messages
from . import state_file
from .state_file import State
from .stream import Completion

if TYPE_CHECKING:
    from .model import Model
    from .prefixes import PrefixTree


def save(
    model: "Model", path: Path, sequence: Completion | Sequence[int], messages: Sequence[Mapping[str, object]]
) -> None:
    """Save a state; arguments and errors as for `Model.save_state`."""
    prefixes, origin = _checked(model, path)
    if isinstance(sequence, Completion):
        # Drop the last token of an answer that fills the context, because a prompt must leave room for one token.
        tokens = (*sequence.prompt_token_ids, *sequence.token_ids)[: model.engine.context - 1]
    else:
        tokens = tuple(sequence)
    ids = model.checked_prompt(tokens)
    if messages:
        # Refuse a message that no chat accepts, because `load` would refuse the file.
        plain_messages(messages)
    state = State(tokens=tuple(ids), messages=tuple(messages))
    state_file.write_state(path, state, prefixes.compute(ids), model.manifest.cache, origin)


def load(model: "Model", path: Path) -> State:
    """Load a state; errors as for `Model.load_state`."""
    prefixes, origin = _checked(model, path)
    engine = model.engine
    stored = state_file.read_state(
        path, model.manifest.cache, origin, context=engine.context - 1, vocab=engine.vocab
    )
    prefixes.pin(stored.state.tokens, stored.spans, stored.watch.check)
    return stored.state


def _checked(model: "Model", path: Path) -> "tuple[PrefixTree, Origin]":
    target = model.target
    if model.prefixes is None or not is_reproducible(target):
        raise PrecastError(
            f"{path}: target {target.name!r} cannot save or load a state, because no other process may reuse its"
            " keys and values; add a target for this CPU with precast add-target."
        )
    return model.prefixes, origin_of(model.manifest, target, kernels.isa())
