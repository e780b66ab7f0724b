"""The tables of components: what they name is there, and the schema is made of them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from fastpeft.adapters import Adapter
from fastpeft.config.load import json_schema
from fastpeft.config.methods import METHODS, RegulariserConfig
from fastpeft.config.optimizers import OPTIMIZERS
from fastpeft.config.registry import Entry, Registry
from fastpeft.config.schedules import SCHEDULES, ScheduleConfig, ScheduleEntry
from fastpeft.config.schema import FAMILIES, RunConfig
from fastpeft.config.tasks import TASKS
from fastpeft.config.trackers import TRACKERS
from fastpeft.schedules import Schedule
from fastpeft.tasks import Task
from fastpeft.trackers.tracker import Tracker
from fastpeft.trainer.optim import Optimizer

BASES = {TASKS: Task, METHODS: Adapter, SCHEDULES: Schedule, OPTIMIZERS: Optimizer, TRACKERS: Tracker}
MEMBERS = [pytest.param(family, entry, id=f"{family.family}-{entry.name}") for family in FAMILIES for entry in family]


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(f, name, id=f"{f.family}-{name}") for f in BASES for name in f.names],
)
def test_every_target_is_a_class_of_its_family(family: Registry[Any], name: str) -> None:
    kind = family.load(name)
    assert issubclass(kind, BASES[family])
    assert not getattr(kind, "__abstractmethods__", None)


@pytest.mark.parametrize("name", METHODS.names)
def test_what_the_table_says_of_a_method_its_class_says_too(name: str) -> None:
    entry, kind = METHODS[name], METHODS.load(name)
    assert (entry.trains_backbone, entry.saved_as) == (kind.trains_backbone, kind.saved_as)
    assert entry.routes == kind.routes


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.key], ids=lambda family: family.family)
def test_the_schemas_choices_are_the_names(family: Registry[Any]) -> None:
    schema = json_schema()
    place = schema
    *sections, last = family.key.split(".")
    for section in sections:
        place = schema["$defs"][place["properties"][section]["$ref"].rpartition("/")[2]]
    assert [name for name in place["properties"][last]["enum"] if name != "auto"] == list(family.names)


@pytest.mark.parametrize(("family", "entry"), MEMBERS)
def test_a_members_own_section_is_a_field_with_its_defaults(family: Registry[Any], entry: Entry) -> None:
    run = RunConfig(run_id="x", method="lora", model=None)  # type: ignore[arg-type]
    holder = getattr(run, family.prefix[:-1]) if family.prefix else run
    section = entry.section_of(holder)
    assert section == (entry.config() if entry.config else entry.default)
    for key in entry.trial:
        assert key in {field.name for field in dataclasses.fields(section)}


def test_sections_stand_where_they_stood_in_stored_runs() -> None:
    assert [field.name for field in dataclasses.fields(RunConfig)] == [
        "run_id", "method", "model", "adapter", "regulariser", "adalora", "unihyperlora", "sat_lora", "schedule",
        "optimizer", "dataset", "training", "budget", "evaluation", "optuna", "wandb", "tensorboard", "stand_in",
        "overrides",
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
def test_a_taken_name_is_refused(family: Registry[Any]) -> None:
    name, version = family.names[0], family.version
    with pytest.raises(ValueError, match=rf"{family.family} '{name}' exists already, as {family[name].target}"):
        family.add(Entry(name=name, target="a:B"))
    assert family.version == version


@pytest.mark.parametrize("key", ["warmup_steps", "fot"])
def test_a_taken_key_of_a_section_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"a section '{key}' exists already; set section="):
        SCHEDULES.add(ScheduleEntry(name="other", target="a:B", config=RegulariserConfig, section=key))
    assert "other" not in SCHEDULES


def test_two_members_may_share_a_section() -> None:
    entry = dataclasses.replace(METHODS["iw_lora"], name="twin")
    METHODS.add(entry)
    try:
        assert METHODS.section_keys == ("regulariser", "adalora", "unihyperlora", "sat_lora")
    finally:
        METHODS.remove("twin")


def test_a_schedule_gets_its_own_section_and_no_other() -> None:
    assert ScheduleConfig(name="snac").own == SCHEDULES["snac"].config()
    assert ScheduleConfig(name="linear").own is None


def test_a_member_is_imported_once_it_is_chosen() -> None:
    code = """
import sys
from fastpeft.adapters import method_class
from fastpeft.config.schedules import ScheduleConfig
from fastpeft.schedules import make_schedule
make_schedule(ScheduleConfig(name="linear"), 1e-3)
method_class("lora")
others = ("schedules.graff", "schedules.fot", "adapters.adalora", "adapters.full")
loaded = [module for module in others if f"fastpeft.{module}" in sys.modules]
sys.exit(f"loaded too: {loaded}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
