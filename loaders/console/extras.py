"""The packages of optional extras."""

import importlib.util

from ..artifact.errors import PrecastError

_EXPORT = ("jax", "flax", "gguf", "huggingface_hub", "rich", "safetensors", "yaml")


def need_export(activity: str = "exporting") -> None:
    """Check that the packages of the extra ``export`` are installed.

    Args:
        activity: the activity that needs the packages, as a noun phrase for the error text.

    Raises:
        PrecastError: packages are missing; the message names them.
    """
    missing = [name for name in _EXPORT if importlib.util.find_spec(name) is None]
    if missing:
        raise PrecastError(
            f"{activity} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed:"
            " pip install 'precast[export]'"
        )
