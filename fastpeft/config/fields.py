"""Types of configuration fields: bounds and formats, declared for pydantic without importing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol


@dataclass(frozen=True)
class Range:
    """Bounds of a number."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> dict:
        return handler(source) | {k: v for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True)
class Parsed:
    """A text that `parse` must accept. The field keeps the text, not the parsed value."""

    parse: Callable[[str], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> dict:
        def check(value: Any) -> Any:
            self.parse(str(value))
            return value

        return {
            "type": "function-before",
            "function": {"type": "no-info", "function": check},
            "schema": handler(source),
        }


class OrOff:
    """A choice of words that includes `off`, which YAML reads as false."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> dict:
        return {
            "type": "function-before",
            "function": {"type": "no-info", "function": lambda value: "off" if value is False else value},
            "schema": handler(source),
        }


@dataclass(frozen=True)
class OrAuto:
    """The word `auto`, or a value that the pydantic-core schema `schema` accepts."""

    schema: dict[str, Any]
    expected: str
    """Description of the valid values, for the error message."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> dict:
        return {
            "type": "union",
            "choices": [self.schema, {"type": "literal", "expected": ["auto"]}],
            "custom_error_type": "or_auto",
            "custom_error_message": f"Input should be {self.expected}",
        }


class _Named(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class OneOf:
    """The name of a member of a registry, or one of the words in `also`. The registry is read when the run's type is
    built, so that components added by other packages count."""

    registry: _Named
    also: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> dict:
        return {"type": "literal", "expected": [*self.also, *self.registry.names]}


@dataclass(frozen=True)
class Described:
    """Documentation of a field that is in no class body, and so can have no docstring."""

    text: str

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Callable) -> dict:
        return handler(core_schema) | {"description": self.text}


# Counts reach torch and NumPy as C integers.
PositiveInt = Annotated[int, Range(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Range(ge=0, lt=2**31)]
PositiveIntOrAuto = Annotated[
    int | Literal["auto"], OrAuto({"type": "int", "ge": 1, "lt": 2**31}, "a whole number of at least 1, or auto")
]
SwitchOrAuto = Annotated[bool | Literal["auto"], OrAuto({"type": "bool"}, "on, off or auto")]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, lt=1)]

STRICT_KEYS = {"extra": "forbid", "use_attribute_docstrings": True, "allow_inf_nan": False}
