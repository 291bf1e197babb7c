"""Readers of the RoPE keys in configs; rope_scaling.py computes the frequencies."""

import math
from collections.abc import Mapping

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .config import ConfigReader
from .rope_scaling import ORIGINAL, SCALINGS, Rope, UnscaledRope

__all__ = ["Rope", "no_rope", "read_rope", "read_rope_by_layer_type"]

# RoPE types: the name of each type in configs, and its key in `SCALINGS`.
TYPES: Mapping[str, str] = {name: name for name in SCALINGS}

# Keys of older configs, by layer type: first the key of the base, then the key of the scaling, if there is one.
_OLDER_KEYS: Mapping[str, tuple[str, ...]] = {
    "full_attention": ("rope_theta", "rope_scaling"),
    "sliding_attention": ("rope_local_base_freq",),
}
_PARTIAL = "partial_rotary_factor"


def no_rope(head_dim: int) -> Rope:
    """Return a RoPE for layers without RoPE; all its frequencies are 0, so it rotates nothing."""
    return Rope(frequencies=np.zeros(head_dim // 2, np.float32))


def read_rope(
    reader: ConfigReader,
    head_dim: int,
    max_positions: int,
    *,
    default_theta: float = 10_000.0,
    theta_key: str = "rope_theta",
    partial: bool = False,
    original_positions: int | None = None,
    types: Mapping[str, str] = TYPES,
) -> Rope:
    """Read the RoPE keys of an older or a newer config.

    Older configs have ``rope_theta`` and ``rope_scaling``; newer configs have ``rope_parameters``, which contains both.

    Args:
        reader: the config.
        head_dim: H.
        max_positions: max_position_embeddings of the config, or its default.
        default_theta: default of the base.
        theta_key: key of the base outside ``rope_parameters``.
        partial: True if the model's code applies partial_rotary_factor, which rotates only a part of each head.
        original_positions: default of original_max_position_embeddings, for models whose config has
            that key outside the RoPE keys; the key is then read for every RoPE type.
        types: the supported RoPE types, in the form of `TYPES`.

    Raises:
        PrecastError: the RoPE type is not supported, or a parameter is missing, unknown, out of range or contradicts
            another.
    """
    parameters = ConfigReader(_parameters(reader), f"{reader.where} rope parameters")
    theta = parameters.take_number("rope_theta", reader.take_number(theta_key, default_theta))
    if not 0 < theta < math.inf:
        raise reader.wrong(theta_key, "a number above 0", theta)
    dims = _rotary_dims(reader, parameters, head_dim, partial)
    scaling = _scaling_type(reader.where, parameters, types)
    original = _original(reader, original_positions, scaling)
    base = UnscaledRope(theta=theta, dims=dims, max_positions=max_positions, original=original)
    rope = SCALINGS[scaling](base, parameters)
    parameters.finish()
    return rope


def read_rope_by_layer_type(
    reader: ConfigReader, head_dim: int, max_positions: int, *, default_thetas: Mapping[str, float]
) -> dict[str, Rope]:
    """Read the RoPE keys of an older or a newer config that has a RoPE for each layer type.

    In newer configs, ``rope_parameters`` contains an object for each layer type. In older configs, ``rope_theta`` and
    ``rope_scaling`` apply to "full_attention"; ``rope_local_base_freq`` is the base of "sliding_attention", whose RoPE
    is not scaled.

    Args:
        reader: the config.
        head_dim: H.
        max_positions: max_position_embeddings of the config, or its default.
        default_thetas: default of the base for each layer type.

    Returns:
        The RoPE of each layer type, in the order of `default_thetas`.

    Raises:
        PrecastError: as `read_rope`, or ``rope_parameters`` contains other layer types.
    """
    newer = reader.take_mapping("rope_parameters")
    if unknown := sorted(
        key for key, value in newer.items() if key not in default_thetas and value is not None
    ):
        raise PrecastError(
            f"{reader.where}: expected rope_parameters to contain only the keys {' and '.join(default_thetas)}, found"
            f" {', '.join(map(repr, unknown))}."
        )
    return {
        layer_type: _read_layer_type(
            reader, layer_type, newer.get(layer_type), head_dim, max_positions, theta
        )
        for layer_type, theta in default_thetas.items()
    }


def _read_layer_type(
    reader: ConfigReader,
    layer_type: str,
    newer: object,
    head_dim: int,
    max_positions: int,
    default_theta: float,
) -> Rope:
    """Read the RoPE of one layer type: select the keys of this type, and pass them to `read_rope` as a config."""
    keys = _OLDER_KEYS.get(layer_type, ())
    stated = {"rope_parameters": newer, **{key: reader.take(key) for key in keys}}
    alone = ConfigReader(stated, f"{reader.where} {layer_type}")
    for table in stated.values():
        # transformers does not read `truncate` from the object of a layer type.
        if isinstance(table, Mapping) and table.get("truncate") not in (None, True):
            raise alone.wrong(
                "truncate", "True, because transformers ignores it for a layer type", table["truncate"]
            )
    theta_key = keys[0] if keys else "rope_theta"
    return read_rope(alone, head_dim, max_positions, default_theta=default_theta, theta_key=theta_key)


def _parameters(reader: ConfigReader) -> dict[str, object]:
    """Return the RoPE parameters, from the newer or the older key.

    If the config has both keys, transformers ignores the newer one, so their values must agree.
    """
    tables = [dict(reader.take_mapping(key)) for key in ("rope_parameters", "rope_scaling")]
    newer, older = ({k: v for k, v in table.items() if v is not None} for table in tables)
    if not newer or not older:
        return newer or older
    type_keys = {"rope_type": older.get("type"), "type": older.get("rope_type")}
    stated = {"rope_theta": reader.peek("rope_theta"), _PARTIAL: reader.peek(_PARTIAL), **type_keys, **older}
    if differing := sorted(key for key in newer if newer[key] != stated.get(key)):
        raise PrecastError(
            f"{reader.where}: rope_parameters and rope_scaling have different values for"
            f" {', '.join(map(repr, differing))}; remove rope_parameters or rope_scaling."
        )
    return newer | older


def _scaling_type(where: str, parameters: ConfigReader, types: Mapping[str, str]) -> str:
    """Return the key in `SCALINGS` of the RoPE type that the parameters name."""
    stated = [str(value) for key in ("rope_type", "type") if (value := parameters.take(key)) is not None]
    if len(set(stated)) > 1:
        raise PrecastError(
            f"{where}: expected rope_type and type to be equal, found {' and '.join(stated)}; remove the wrong key."
        )
    name = stated[0] if stated else "default"
    if name not in types:
        raise PrecastError(
            f"{where}: expected the RoPE type to be one of {', '.join(sorted(types))}, found {name!r}."
        )
    return types[name]


def _rotary_dims(reader: ConfigReader, parameters: ConfigReader, head_dim: int, partial: bool) -> int:
    """Return the number of rotated dimensions of a head: H times ``partial_rotary_factor``, rounded down."""
    parts = {
        place.take_number(_PARTIAL, 1.0) for place in (reader, parameters) if place.peek(_PARTIAL) is not None
    }
    if not partial and (others := parts - {1.0}):
        raise PrecastError(
            f"{reader.where}: expected {_PARTIAL} to be 1 for this architecture, found"
            f" {' and '.join(map(str, sorted(others)))}; correct or remove it."
        )
    if len(parts) > 1:
        raise PrecastError(
            f"{reader.where}: {_PARTIAL} has two values, {' and '.join(map(str, sorted(parts)))}; remove the wrong one."
        )
    part = parts.pop() if parts else 1.0
    if not 0 < part <= 1 or int(head_dim * part) < 1:
        raise PrecastError(
            f"{reader.where}: expected {_PARTIAL!r} to be at most 1, and large enough to rotate at least one of a"
            f" head's {head_dim} dimensions, found {part!r}."
        )
    return int(head_dim * part)


def _original(reader: ConfigReader, default: int | None, scaling: str) -> int | None:
    """Return the original context length that the config states outside the RoPE parameters, or else `default`."""
    # The other RoPE types do not use this key, so it is not read for them. `ConfigReader.finish` refuses the config if
    # the architecture does not read the key either.
    if default is None and scaling not in ("llama3", "longrope", "yarn"):
        return None
    return default if reader.peek(ORIGINAL) is None else reader.take_size(ORIGINAL)
