"""Frozen dataclasses that are cheap to define.

The standard `dataclass` compiles six methods for every class, which costs about 1 ms a class at start-up. All
subclasses of `Frozen` share one set of methods.
"""

from dataclasses import MISSING, Field, FrozenInstanceError, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform


class _Signature:
    """A descriptor that, on access, computes the constructor's signature from the fields."""

    def __get__(self, _: object, owner: "type[Frozen]") -> Any:
        from inspect import Parameter, Signature

        defaults = {n: f.default for n, f in owner.__dataclass_fields__.items() if f.default is not MISSING}
        return Signature(
            [
                Parameter(
                    n, Parameter.KEYWORD_ONLY, default=defaults.get(n, Parameter.empty), annotation=f.type
                )
                for n, f in owner.__dataclass_fields__.items()
            ]
        )


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Frozen:
    """A base for frozen, keyword-only dataclasses.

    `dataclasses.fields`, `replace` and `asdict` work as usual.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    else:
        __signature__ = _Signature()  # for `help` and for notebooks; type checkers derive it from the fields

    def __init_subclass__(cls) -> None:
        cls.__doc__ = (
            cls.__doc__ or cls.__name__
        )  # otherwise `dataclass` builds a docstring from the signature
        dataclass(init=False, repr=False, eq=False)(cls)

    def __init__(self, **values: Any) -> None:
        fields = type(self).__dataclass_fields__
        if values.keys() != fields.keys():
            values = self._completed(values)
        self.__dict__.update(values)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the values; subclasses override this."""

    def _completed(self, values: dict[str, Any]) -> dict[str, Any]:
        fields = type(self).__dataclass_fields__
        if unknown := sorted(values.keys() - fields.keys()):
            raise TypeError(f"{type(self).__name__} has no field {unknown[0]!r}")
        values = {n: f.default for n, f in fields.items() if f.default is not MISSING} | values
        if missing := sorted(fields.keys() - values.keys()):
            raise TypeError(f"{type(self).__name__} needs {', '.join(missing)}")
        return values

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in type(self).__dataclass_fields__)

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        values = zip(type(self).__dataclass_fields__, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values)})"
