"""Fetch a model from the Hugging Face hub by its id, and read it."""

import re
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError

from .base import Source

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repo>(?:{_NAME}/)?(?P<name>{_NAME}))(?:@(?P<revision>[A-Za-z0-9._/-]+))?")

# Endings of file names. A spec with one of these endings names a missing file, not a model on the hub.
_FILE_ENDINGS = (".gguf", ".safetensors", ".json", ".bin", ".pt", ".pth", ".zip", ".onnx")

# The files to fetch. Pickles and Python code are never fetched.
_PATTERNS = (
    "config.json",
    "hf_quant_config.json",
    "adapter_config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "README.md",
)


def is_hub_id(spec: str) -> bool:
    """Return True if `spec` has the form "name" or "org/name", optionally with "@revision"."""
    match = _HUB_ID.fullmatch(spec)
    if match is None or "--" in match["repo"] or ".." in spec:  # the hub allows no id with these
        return False
    return not match["name"].lower().endswith(_FILE_ENDINGS)


def open_hub(spec: str) -> Source:
    """Fetch a model into the hub's cache (``HF_HOME``) and read it; a cached model needs no network.

    ``HF_HUB_OFFLINE`` and the other settings of huggingface-hub apply.

    Raises:
        PrecastError: the model cannot be fetched, or `open_huggingface` refuses it.
    """
    from .huggingface.source import open_huggingface

    match = _HUB_ID.fullmatch(spec)
    if match is None:
        raise PrecastError(
            f"{spec!r}: expected a hub id such as org/name or org/name@revision; check the spelling."
        )
    return open_huggingface(_fetch(match["repo"], match["revision"]), name=match["name"])


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    refused = _probe(repo, revision)
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(_PATTERNS),
                local_files_only=refused is not None,
            )
        )
    # The HTTP library, and with it the class of its exceptions, depends on the version of huggingface-hub.
    except Exception as error:
        # If the hub has refused the request, its reason explains more than the error about a missing cached copy.
        reason = refused if isinstance(refused, errors.HfHubHTTPError | ValueError) else error
        raise PrecastError(_explain(repo, revision, reason)) from error


def _probe(repo: str, revision: str | None) -> Exception | None:
    """Ask the hub about the model, with a time limit; return the exception that the request raises, or None.

    `snapshot_download` has no time limit for its requests, so it hangs for minutes if the network drops packets. The
    caller therefore lets `snapshot_download` use the network only after this request has succeeded.
    """
    from huggingface_hub import HfApi, constants

    try:
        HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of a type that depends on the version of huggingface-hub
        return error
    return None


def _explain(repo: str, revision: str | None, error: Exception) -> str:
    """Return one sentence for an error of huggingface-hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo}: is gated; accept its terms on its page on the hub, then run `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: has no revision {revision!r} on the hub; check the spelling."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo}: there is no such directory or .gguf file, and the hub has no such model that you may read; "
            "check the spelling, or run `hf auth login` if the model is private."
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"{repo}: is missing from the local hub cache, or incomplete, and the hub cannot be reached; connect "
            "to the network (unset HF_HUB_OFFLINE if it is set), or name a directory or .gguf file."
        )
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{repo}: cannot be fetched from the hub ({type(error).__name__}: {reason}); try again later."
