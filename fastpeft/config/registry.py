"""Registries: one table for each family of components, with the members' names, Configs and modules.

A run chooses one member of a family (task, method, schedule, optimizer), or any number (trackers). The table gives the
valid names, the members' own sections of a run file, `fastpeft runs schema`, the tests of all members, and the class to
build. A module is imported when its member is chosen. Nothing here imports torch or pydantic.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Any, Generic, TypeVar

from fastpeft.config.fields import Described


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One member of a family. A family that needs further facts about its members subclasses Entry."""

    name: str
    """The name in a run file."""
    target: str
    """`package.module:Class`."""
    config: type | None = None
    """Frozen dataclass of the member's own section, with `__pydantic_config__ = STRICT_KEYS`, so that a mistyped key is
    refused. An optional method `problems(beside)` yields errors of the section, and is called if the member is chosen.
    An optional class attribute TRIAL holds the section's settings for `--mode trial`."""
    section: str | None = None
    """Key of that section; the name when absent."""
    default: bool | None = None
    """Default of a section that is a switch instead of a dataclass."""
    doc: str = ""
    """Documentation of such a switch in `fastpeft runs schema`. A Config has docstrings instead."""

    def __post_init__(self) -> None:
        if self.section is None and self.has_section:
            object.__setattr__(self, "section", self.name)

    @property
    def has_section(self) -> bool:
        return self.config is not None or self.default is not None

    @property
    def trial(self) -> dict[str, Any]:
        """Keys of the member's own section and their values under `--mode trial`."""
        return dict(getattr(self.config, "TRIAL", {}))

    def section_of(self, owner: Any) -> Any:
        """The member's own section, an attribute of `owner`; None for a member without one."""
        return getattr(owner, self.section) if self.section is not None else None

    def field(self) -> tuple[Any, Any]:
        """(annotation, default) of the section as a dataclass field."""
        if self.config is not None:
            return self.config, field(default_factory=self.config)
        return Annotated[bool, Described(self.doc)], self.default


E = TypeVar("E", bound=Entry)
T = TypeVar("T")


class Registry(Generic[E]):
    """The members of one family, in the order in which they were added.

    Args:
        family: the word for a member in messages.
        key: dotted key of a run file that chooses a member. The members' own sections are siblings of this key. Empty
            for a family of which a run chooses any number, each by its own section.
        entries: the first members.
    """

    def __init__(self, family: str, key: str, entries: Iterable[E] = ()) -> None:
        self.family, self.key = family, key
        self.version = 0
        """Number of changes to the table. Anything built from an earlier version is stale."""
        self._entries: dict[str, E] = {}
        self._owner: type | None = None
        for entry in entries:
            self.add(entry)

    def add(self, entry: E) -> None:
        """Make a component available under its name.

        Raises:
            ValueError: the name, or the key of its section, is taken.
        """
        if entry.name in self._entries:
            taken = self._entries[entry.name].target
            raise ValueError(f"{self.family} {entry.name!r} exists already, as {taken}: choose another name")
        shared = any((other.section, other.config) == (entry.section, entry.config) for other in self)
        if entry.section in self._taken_keys() and not shared:
            raise ValueError(f"{self.family} {entry.name!r}: a section {entry.section!r} exists already; set section=")
        self._entries[entry.name] = entry
        self.version += 1

    def remove(self, name: str) -> None:
        """Undo `add`. Raises KeyError for an unknown name."""
        del self._entries[name]
        self.version += 1

    def _taken_keys(self) -> set[str | None]:
        if self._owner is None:
            return set()
        families: tuple[Registry[Any], ...] = getattr(self._owner, _FAMILIES)
        return {*self._owner.__annotations__, *(entry.section for family in families for entry in family)} - {None}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def section_keys(self) -> tuple[str, ...]:
        """Section keys of the members that have a section, each once."""
        return tuple(dict.fromkeys(entry.section for entry in self if entry.section is not None))

    @property
    def prefix(self) -> str:
        """Prefix of the members' sections in a dotted key: `schedule.`, or empty."""
        return self.key[: self.key.rfind(".") + 1]

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[E]:
        return iter(self._entries.values())

    def load(self, name: str) -> Any:
        """The member's class. Imports its module. Raises KeyError for an unknown name."""
        return import_target(self[name].target)

    def chosen(self, run: Any) -> E | None:
        """The member that a run chooses; None if it leaves the choice open (`auto`), or the family has no key."""
        if not self.key:
            return None
        return self._entries.get(getattr(self._holder(run), self.key.rpartition(".")[2]))

    def own_section(self, run: Any) -> Any:
        """The chosen member's own section of a run; None for a member without one."""
        entry = self.chosen(run)
        return None if entry is None else entry.section_of(self._holder(run))

    def sections(self, run: Any) -> dict[str, Any]:
        """Member's name -> own section, for every member that has one."""
        holder = self._holder(run)
        return {entry.name: entry.section_of(holder) for entry in self if entry.has_section}

    def _holder(self, run: Any) -> Any:
        for part in self.prefix.split(".")[:-1]:
            run = getattr(run, part)
        return run


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Facts of sibling sections that `problems` of a member's own section may depend on."""

    warmup_steps: int
    """schedule.warmup_steps."""
    optimizer: str
    averages: bool
    """The optimizer evaluates and saves an average of the training iterates."""


def import_target(target: str) -> Any:
    """The object that `package.module:name` names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


_FAMILIES = "__families__"


def with_sections(registry: Registry[Any], after: str = "") -> Callable[[type[T]], type[T]]:
    """Class decorator, to be placed below @dataclass: adds a field for every member's own section.

    Args:
        after: the field after which they are inserted; at the end when empty.
    """

    def decorate(cls: type[T]) -> type[T]:
        own = dict(cls.__annotations__)
        place = list(own).index(after) + 1 if after else len(own)
        added = {}
        for entry in registry:
            if entry.section is not None:
                added[entry.section], default = entry.field()
                setattr(cls, entry.section, default)
        items = list(own.items())
        cls.__annotations__ = dict([*items[:place], *added.items(), *items[place:]])
        setattr(cls, _FAMILIES, (*getattr(cls, _FAMILIES, ()), registry))
        registry._owner = cls
        return cls

    return decorate


def complete(cls: type[T]) -> type[T]:
    """`cls` with sections for members that were added after its definition, also inside its own sections.

    `cls` itself if there are none, else a subclass of it.
    """
    owner: Any = cls
    known = {f.name: f for f in dataclasses.fields(owner)}
    more: dict[str, tuple[Any, Any]] = {}
    for registry in getattr(cls, _FAMILIES, ()):
        more |= {e.section: e.field() for e in registry if e.section is not None and e.section not in known}
    for name, annotation in typing.get_type_hints(cls).items():
        if name in known and isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            whole: Any = complete(annotation)
            if whole is not annotation:
                optional = known[name].default_factory is not dataclasses.MISSING
                more[name] = whole, field(default_factory=whole) if optional else field()
    if not more:
        return cls
    # Under the module and name of the original, whose source has the fields' docstrings.
    copied = {key: vars(cls)[key] for key in ("__module__", "__doc__", "__firstlineno__") if key in vars(cls)}
    specs = [(name, annotation, default) for name, (annotation, default) in more.items()]
    made: Any = dataclasses.make_dataclass(
        cls.__name__, specs, bases=(cls,), namespace=copied, frozen=True, kw_only=True
    )
    return made
