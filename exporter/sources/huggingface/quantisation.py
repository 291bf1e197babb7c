"""Read the config of a quantised checkpoint: the layout of its tensors, and the settings of each module.

A config states rules in one of three forms. For the first two, the first rule that matches the name of a module
determines the module's settings:

- GPTQ and AWQ: the keys of ``dynamic`` are regular expressions that match the beginning of a name, in order. A key that
  begins with "-:" excludes modules from quantisation. Any other key, with or without "+:", overrides settings.
- AutoRound: the keys of ``extra_config`` are names, or regular expressions that match any part of a name. Names come
  first. A module with 16 or more bits is not quantised.
- compressed-tensors: the ``targets`` of each group in ``config_groups`` are names, regular expressions after "re:" that
  match the beginning of a name, and names of classes. If several groups match a module, the first that fits the shapes
  of the module's tensors determines the settings. The order of names, patterns and classes is precast's own.

Sources: GPTQModel (https://github.com/ModelCloud/GPTQModel), AutoRound (https://github.com/intel/auto-round) and
compressed-tensors (https://github.com/neuralmagic/compressed-tensors).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

BITS = (1, 2, 4, 8)
# The bits of the integers in each layout.
_LAYOUT_BITS = {"gptq": (2, 4, 8), "awq": (4,)}
# AutoRound's packing formats: the layout, and the number to add to stored zero points.
_AUTO_ROUND: Mapping[str, tuple[str, int | None]] = {
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round": ("gptq", 0),
    "auto_round:auto_awq": ("awq", 0),
}
# Keys with which a rule could choose another layout for its modules.
_LAYOUT_KEYS = {"checkpoint_format", "format", "method", "packing_format", "quant_method"}
# Weights with this many bits are floats, so they are not quantised.
_FLOAT_BITS = 16
# transformers' default for FP8.
_FP8_BLOCK = [128, 128]
# The readable formats of compressed-tensors; None for a config that names no format.
_COMPRESSED = (
    None,
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)
# The embeddings that compressed-tensors' class "Embedding" matches. Other classes match every module.
_EMBEDDINGS = r"(.*\.)?(embed_tokens|wte)\Z"
_PATTERN_CHARACTERS = re.compile(r"[^\w.-]")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings with which modules are quantised.

    Attributes:
        bits: number of bits of an integer; 0 if it follows from the shapes.
        group: number of consecutive inputs that share a scale; 0 if it follows from the shapes.
        block: rows and columns of a block that shares a scale; None if they follow from the shapes.
        is_float: True for FP8, False for integers; None for either.
    """

    bits: int = 0
    group: int = 0
    block: tuple[int, int] | None = None
    is_float: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule about some modules.

    Attributes:
        matches: returns a true value for the name of a module that the rule concerns.
        settings: the settings of these modules; None if they are not quantised.
    """

    matches: Callable[[str], object]
    settings: Settings | None


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """The quantisation that a checkpoint's config describes.

    Attributes:
        method: the method that the config names, for messages.
        layout: "gptq", "awq", "fp8", "compressed-tensors" or "bitsandbytes": the tensors that store a weight.
        zero_offset: the number to add to stored zero points.
        default: the settings of modules that no rule matches.
        rules: rules about some modules, in the order of their precedence.
    """

    method: str
    layout: str
    zero_offset: int = 0
    default: Settings = Settings()
    rules: tuple[Rule, ...] = ()

    def settings_of(
        self, module: str, *, is_float: bool = False, fits: Callable[[Settings], bool] = lambda _: True
    ) -> Settings | None:
        """Return the settings of the first matching rule that fits, or else of the first matching rule.

        Args:
            module: the module's name.
            is_float: True if the module stores FP8. Rules about the other kind of numbers do not apply.
            fits: returns True for settings that fit the shapes of the module's tensors.

        Returns:
            The settings, or the default if no rule matches; None if the module is not quantised.
        """
        matching = [
            rule.settings
            for rule in self.rules
            if (rule.settings is None or rule.settings.is_float in (None, is_float)) and rule.matches(module)
        ]
        fitting = (settings for settings in matching if settings is None or fits(settings))
        return next(fitting, matching[0] if matching else self.default)


def quantisation_of(method: str, config: Mapping[str, object]) -> Quantisation | None:
    """Return the quantisation that a ``quantization_config`` describes; None if precast cannot read it."""
    try:
        match method:
            case "fp8":
                block = _block(config.get("weight_block_size", _FP8_BLOCK))
                return Quantisation(method=method, layout="fp8", default=Settings(block=block))
            case "compressed-tensors" if _is_readable(config):
                return Quantisation(method=method, layout=method, rules=_targets(config.get("config_groups")))
            case "bitsandbytes":
                return Quantisation(method=method, layout=method)
        return _integers(method, config)
    except (re.error, OverflowError, RecursionError):  # a pattern that Python cannot compile
        return None


# --- GPTQ, AWQ and AutoRound ------------------------------------------------------------------------------------


def _integers(method: str, config: Mapping[str, object]) -> Quantisation | None:
    """Return the quantisation that a config of GPTQ, AWQ or AutoRound describes; None if precast cannot read it."""
    stated = config.get("checkpoint_format")
    rules = _dynamic
    match method:
        case "gptq" if not config.get("is_marlin_format"):
            layout, offset = "gptq", {"": 1, "gptq": 1, "gptq_v2": 0}.get(_text(stated))
        case "awq" if _text(config.get("version") or stated or "gemm").lower() == "gemm":
            layout, offset = "awq", 0
        case "auto-round" | "intel/auto-round" if config.get("data_type", "int") == "int":
            layout, offset = _AUTO_ROUND.get(_text(config.get("packing_format")), ("", None))
            rules = _extra_config
        case _:
            return None
    base = _overridden(Settings(bits=4), config)
    if offset is None or base is None:
        return None
    found = Quantisation(
        method=method, layout=layout, zero_offset=offset, default=base, rules=tuple(rules(base, config))
    )
    every = [base, *(rule.settings for rule in found.rules)]
    return found if all(s is None or s.bits in _LAYOUT_BITS[layout] for s in every) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else "?"


def _overridden(base: Settings, stated: Mapping[str, object]) -> Settings | None:
    """Return the settings with the bits and the group size that a config or a rule states; None for wrong bits."""
    bits = stated.get("bits", stated.get("w_bit", base.bits))
    size = stated.get("group_size", stated.get("q_group_size", base.group))
    if type(bits) is not int:
        return None
    # −1 stands for a single group.
    return replace(base, bits=bits, group=size if type(size) is int and size > 0 else 0)


def _stated_rules(config: Mapping[str, object], key: str) -> dict[str, Mapping[str, object]]:
    """Return the rules under a key of a config, by pattern; a rule that precast cannot read has zero bits."""
    stated = config.get(key) or {}
    if not isinstance(stated, dict):
        return {"": {"bits": 0}}
    return {
        pattern: rule if isinstance(rule, dict) and not rule.keys() & _LAYOUT_KEYS else {"bits": 0}
        for pattern, rule in stated.items()
    }


def _dynamic(base: Settings, config: Mapping[str, object]) -> Iterator[Rule]:
    """Yield the rules of GPTQModel's ``dynamic``."""
    for pattern, stated in _stated_rules(config, "dynamic").items():
        is_excluded = pattern.startswith("-:")
        own = re.compile(pattern.removeprefix("-:" if is_excluded else "+:"))
        settings = None if is_excluded else _overridden(base, stated) or Settings()
        yield Rule(matches=own.match, settings=settings)


def _extra_config(base: Settings, config: Mapping[str, object]) -> Iterator[Rule]:
    """Yield the rules of AutoRound's ``extra_config``: names first, then patterns."""
    stated = _stated_rules(config, "extra_config")
    for key in sorted(stated, key=_is_pattern):
        rule = stated[key]
        if _is_pattern(key) and not rule:
            continue  # AutoRound ignores a pattern without settings
        stated_settings = _overridden(base, rule) or Settings()
        settings: Settings | None = stated_settings
        if stated_settings.bits >= _FLOAT_BITS:
            settings = None
        elif (rule.get("data_type") or "int") != "int":
            settings = Settings()
        yield Rule(matches=re.compile(key).search if _is_pattern(key) else key.__eq__, settings=settings)


def _is_pattern(key: str) -> bool:
    """Return True if a key of ``extra_config`` is a regular expression instead of a name."""
    return _PATTERN_CHARACTERS.search(key) is not None


# --- compressed-tensors -----------------------------------------------------------------------------------------


def _is_readable(config: Mapping[str, object]) -> bool:
    """Return True if a config of compressed-tensors has a known format, and neither sparse nor transformed weights.

    Seven bits would take the space of eight, so the shapes would not tell them apart.
    """
    sparsity = config.get("sparsity_config") or {"format": "dense"}
    is_dense = isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense")
    # A transform rotates the activations at run time, so the weights alone are not the model.
    has_known_bits = all(
        weights.get("num_bits", 4) in BITS for _, weights in _schemes(config.get("config_groups"))
    )
    is_known = config.get("format") in _COMPRESSED and not config.get("transform_config")
    return is_dense and is_known and has_known_bits


def _schemes(groups: object) -> list[tuple[list[object], Mapping[str, object]]]:
    """Return the targets and the description of the weights of each group in ``config_groups``."""
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            targets = group.get("targets")
            found.append((targets if isinstance(targets, list) and targets else [""], group["weights"]))
    return found


def _targets(groups: object) -> tuple[Rule, ...]:
    """Return the rules of ``config_groups``: names first, then patterns, then classes."""
    ranked = []
    for targets, weights in _schemes(groups):
        settings = _scheme(weights)
        for target in targets:
            rank, pattern = _target(str(target))
            ranked.append((rank, Rule(matches=re.compile(pattern).match, settings=settings)))
    return tuple(rule for _, rule in sorted(ranked, key=lambda each: each[0]))


def _target(target: str) -> tuple[int, str]:
    """Return the rank and the pattern of a target. Classes begin with a capital letter, names of modules do not."""
    if target.startswith("re:"):
        return 1, target.removeprefix("re:")
    if target == "Embedding":
        return 2, _EMBEDDINGS
    return (3, "") if not target or target[0].isupper() else (0, rf"{re.escape(target)}\Z")


def _scheme(weights: Mapping[str, object]) -> Settings:
    """Return the settings that a description of weights states."""
    size, bits, kind = (weights.get(key) for key in ("group_size", "num_bits", "type"))
    group = size if type(size) is int and size > 0 else 0
    return Settings(
        bits=bits if type(bits) is int else 0,
        group=group,
        block=_block(weights.get("block_structure")) or ((1, group) if group else None),
        is_float={"float": True, "int": False}.get(_text(kind)),
    )


def _block(size: object) -> tuple[int, int] | None:
    """Return the rows and columns of a block; None if `size` is not a list of two positive integers."""
    match size:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None
