"""Rotary position embeddings, as configs spell them; rope_scaling.py has what they mean."""

import math
from collections.abc import Mapping

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .config import ConfigReader
from .rope_scaling import ORIGINAL, SCALINGS, Base, Rope

__all__ = ["Rope", "no_rope", "read_rope", "read_rope_by_layer_type"]

# What a config calls a scaling, and which that is.
TYPES: Mapping[str, str] = {name: name for name in SCALINGS}

# Where older files have a layer type's base, and its scaling, if it may have one.
_OLDER: Mapping[str, tuple[str, ...]] = {
    "full_attention": ("rope_theta", "rope_scaling"),
    "sliding_attention": ("rope_local_base_freq",),
}
_PART = "partial_rotary_factor"


def no_rope(head_dim: int) -> Rope:
    """A RoPE that turns nothing, for layers without; with a `head_dim` of 0 for models without (P = 0)."""
    return Rope(frequencies=np.zeros(head_dim // 2, np.float32))


def read_rope(
    config: ConfigReader,
    head_dim: int,
    max_positions: int,
    *,
    default_theta: float = 10_000.0,
    theta_key: str = "rope_theta",
    partial: bool = False,
    original_positions: int | None = None,
    types: Mapping[str, str] = TYPES,
) -> Rope:
    """Reads the RoPE keys of a config, in both spellings.

    Older files have ``rope_theta`` and ``rope_scaling``, newer ones ``rope_parameters`` with everything in it.

    Args:
        config: of the model.
        head_dim: H.
        max_positions: the config's max_position_embeddings, or what stands for it.
        default_theta: the base where the config has none.
        theta_key: what the base is called outside ``rope_parameters``.
        partial: whether the model's code turns only a part of a head where partial_rotary_factor says so.
        original_positions: original_max_position_embeddings where the config has none, for models that have such a
            key of their own; it is then taken whatever the RoPE type is.
        types: RoPE types that the model may have, as configs call them, each with its name in `SCALINGS`.

    Raises:
        PrecastError: for a RoPE type that is not understood, and for missing, unknown, contradicting or unusable
            parameters.
    """
    parameters = ConfigReader(_parameters(config), f"{config.where} rope parameters")
    theta = parameters.take_number("rope_theta", config.take_number(theta_key, default_theta))
    if not 0 < theta < math.inf:
        raise config.wrong(theta_key, "a number above 0", theta)
    dims = _turned(config, parameters, head_dim, partial)
    kind = _kind(config.where, parameters, types)
    original = _original(config, original_positions, kind)
    base = Base(theta=theta, dims=dims, max_positions=max_positions, original=original)
    rope = SCALINGS[kind](base, parameters)
    parameters.finish()
    return rope


def read_rope_by_layer_type(
    config: ConfigReader, head_dim: int, max_positions: int, *, default_thetas: Mapping[str, float]
) -> dict[str, Rope]:
    """Reads the RoPE keys of a config whose layer types have each their own, in both spellings.

    In newer files ``rope_parameters`` has a table for each type. In older ones ``rope_theta`` and ``rope_scaling``
    are those of "full_attention", and ``rope_local_base_freq`` is the base of "sliding_attention", which is not scaled.

    Args:
        config: of the model.
        head_dim: H.
        max_positions: the config's max_position_embeddings, or what stands for it.
        default_thetas: the layer types, each with its base where the config has none.

    Returns:
        Of each layer type, in that order.

    Raises:
        PrecastError: as `read_rope`, and for tables of other layer types.
    """
    newer = config.take_mapping("rope_parameters")
    if unknown := sorted(
        key for key, value in newer.items() if key not in default_thetas and value is not None
    ):
        raise PrecastError(
            f"{config.where}: rope_parameters has {', '.join(map(repr, unknown))}, expected a table for each of"
            f" {', '.join(default_thetas)} and nothing else."
        )
    return {
        kind: _of_layers(config, kind, newer.get(kind), head_dim, max_positions, theta)
        for kind, theta in default_thetas.items()
    }


def _of_layers(
    config: ConfigReader, kind: str, newer: object, head_dim: int, max_positions: int, default_theta: float
) -> Rope:
    """The RoPE of one layer type, whose keys are looked at as if they were a config."""
    keys = _OLDER.get(kind, ())
    said = {"rope_parameters": newer, **{key: config.take(key) for key in keys}}
    alone = ConfigReader(said, f"{config.where} {kind}")
    for table in said.values():
        # transformers asks for it beside the tables of the layer types, where it cannot be.
        if isinstance(table, Mapping) and table.get("truncate") not in (None, True):
            raise alone.wrong(
                "truncate", "True, because transformers ignores it for a layer type", table["truncate"]
            )
    theta_key = keys[0] if keys else "rope_theta"
    return read_rope(alone, head_dim, max_positions, default_theta=default_theta, theta_key=theta_key)


def _parameters(config: ConfigReader) -> dict[str, object]:
    """The table of parameters, under its older or its newer name.

    transformers forgets the newer one where both are there; then they have to say the same.
    """
    tables = [dict(config.take_mapping(key)) for key in ("rope_parameters", "rope_scaling")]
    newer, older = ({k: v for k, v in table.items() if v is not None} for table in tables)
    if not newer or not older:
        return newer or older
    spelt = {"rope_type": older.get("type"), "type": older.get("rope_type")}
    said = {"rope_theta": config.peek("rope_theta"), _PART: config.peek(_PART), **spelt, **older}
    if differing := sorted(key for key in newer if newer[key] != said.get(key)):
        raise PrecastError(
            f"{config.where}: rope_parameters and rope_scaling disagree about {', '.join(map(repr, differing))}; remove"
            " the one that is wrong."
        )
    return newer | older


def _kind(where: str, parameters: ConfigReader, types: Mapping[str, str]) -> str:
    """Which of `SCALINGS` the parameters are for."""
    said = [str(value) for key in ("rope_type", "type") if (value := parameters.take(key)) is not None]
    if len(set(said)) > 1:
        raise PrecastError(f"{where}: rope_type and type disagree: {' and '.join(said)}.")
    name = said[0] if said else "default"
    if name not in types:
        raise PrecastError(
            f"{where}: RoPE type {name!r} is not supported; expected one of {', '.join(sorted(types))}."
        )
    return types[name]


def _turned(config: ConfigReader, parameters: ConfigReader, head_dim: int, partial: bool) -> int:
    """How many dimensions of a head are turned: a part of it, if any, rounded down."""
    parts = {place.take_number(_PART, 1.0) for place in (config, parameters) if place.peek(_PART) is not None}
    if not partial and parts - {1.0}:
        raise PrecastError(f"{config.where}: {_PART} other than 1 is not supported.")
    if len(parts) > 1:
        raise PrecastError(
            f"{config.where}: {_PART} is {' and '.join(map(str, sorted(parts)))}; remove the one that is wrong."
        )
    part = parts.pop() if parts else 1.0
    if not 0 < part <= 1 or int(head_dim * part) < 1:
        raise PrecastError(
            f"{config.where}: {_PART!r} is {part!r}, expected a number above 0 and not above 1 that leaves something"
            f" of a head of {head_dim} dimensions."
        )
    return int(head_dim * part)


def _original(config: ConfigReader, default: int | None, kind: str) -> int | None:
    """Positions before the stretching, where the config has the key outside the parameters."""
    # Elsewhere the key says nothing of RoPE, and whoever reads the config has to know it.
    if default is None and kind not in ("llama3", "longrope", "yarn"):
        return None
    return default if config.peek(ORIGINAL) is None else config.take_size(ORIGINAL)
