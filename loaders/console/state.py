"""The option ``--state`` of ``run`` and ``chat``: continue a saved sequence, and save it with its answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.errors import PrecastError

if TYPE_CHECKING:
    from ..generation.model import Message, Model
    from ..generation.state_file import State
    from ..generation.stream import Completion
    from .run import Prompt


def load(model: "Model", path: Path, prompt: "Prompt") -> "State | None":
    """Load the state that an earlier command saved, or return None if the file does not exist yet.

    Raises:
        PrecastError: the state does not fit the artifact, or an option does not fit the state.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise PrecastError(
                f"{path}: its folder does not exist; create the folder, or choose another file."
            )
        return None
    state = model.load_state(path)
    if state.messages and prompt.system is not None:
        raise PrecastError(
            f"{path}: the chat has begun, so --system cannot change the system message; leave out --system, or choose"
            " another file."
        )
    if state.messages and prompt.ids is not None:
        raise PrecastError(
            f"{path}: contains a chat, which --ids cannot continue; use --prompt instead of --ids."
        )
    if not state.messages and prompt.uses_template:
        raise PrecastError(
            f"{path}: contains text, not a chat; leave out --chat, --system and --literal, or choose another file."
        )
    return state


def continued(model: "Model", state: "State", prompt: "Prompt", text: str) -> list[int]:
    """Return the tokens of a saved text, followed by the tokens of the prompt."""
    following = (
        prompt.ids if prompt.ids is not None else model.tokenizer.encode(text, add_special_tokens=False)
    )
    return [*state.tokens, *following]


def save(model: "Model", path: Path, completion: "Completion", asked: "Sequence[Message]") -> None:
    """Save a sequence with its answer.

    Args:
        model: the model.
        path: the file.
        completion: the answer.
        asked: the messages that the answer responds to; empty for text.

    Raises:
        PrecastError: see `Model.save_state`.
    """
    messages = [*asked, completion.message()] if asked else ()
    model.save_state(path, completion, messages=messages)
