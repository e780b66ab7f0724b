"""Imports point down only, no two files need each other, and what a display needs loads no torch."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support.import_graph import PACKAGE, circles, file_graph, imports, modules

# Lowest first. A module belongs to the longest entry that begins its name, and may import its own
# layer's entry and lower layers. Members of one layer do not import each other.
LAYERS = [
    {"fastpeft.kernels"},
    {
        "fastpeft._version",
        "fastpeft.errors",
        "fastpeft.atomic_write",
        "fastpeft.launched",
        "fastpeft.phases",
        "fastpeft.signals",
    },
    {"fastpeft.ranks"},
    {"fastpeft.config", "fastpeft.hub", "fastpeft.device_memory", "fastpeft.standins"},
    {"fastpeft.runs"},
    {"fastpeft.trackers"},
    {"fastpeft.data"},
    {"fastpeft.models"},
    {"fastpeft.adapters", "fastpeft.schedules", "fastpeft.budget"},
    {"fastpeft.tasks"},
    {"fastpeft.trainer"},
    {"fastpeft.compare", "fastpeft.export", "fastpeft.doctor", "fastpeft.sweep"},
    {"fastpeft.tui"},
    {"fastpeft.cli"},
    {"fastpeft.__main__", "fastpeft"},  # the public face: nothing below may import it
    {"fastpeft.standins.build_deberta", "fastpeft.standins.build_qwen3"},  # scripts: nothing imports them
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

WITHOUT_TORCH = {
    "fastpeft", "fastpeft._version", "fastpeft.errors", "fastpeft.atomic_write", "fastpeft.launched", "fastpeft.phases",
    "fastpeft.hub", "fastpeft.config", "fastpeft.standins", "fastpeft.runs", "fastpeft.trackers", "fastpeft.tui",
    "fastpeft.cli",
}  # fmt: skip
TORCH = {"torch", "triton", "transformers", "peft", "datasets", "accelerate", "safetensors", "tokenizers", "numpy"}

SHARED_FILE_NAMES = {
    "__init__.py": "*",
    "__main__.py": "*",
    "reference.py": "kernels/ops/*",
    "kernel.py": "kernels/ops/*",
    "op.py": "kernels/ops/*",
    "task.py": "tasks/*",
    "datasets.py": "tasks/*",
    "reading.py": "tasks/*",
}
"""Names that say the same in every folder of a kind, and where those folders are."""


def entry(name: str) -> str | None:
    """The entry of LAYERS that a module, or a name in it, belongs to."""
    parts = name.split(".")
    prefixes = [".".join(parts[:i]) for i in range(len(parts), 1, -1)] or [name]
    return next((prefix for prefix in prefixes if prefix in LEVEL), None)


def imports_upward(name: str, path: Path) -> list[str]:
    mine, found = entry(name), []
    for imported, line in imports(name, path):
        theirs = entry(imported) or "fastpeft"
        if imported.partition(".")[0] == "fastpeft" and theirs != mine and not LEVEL[theirs] < LEVEL[mine]:
            found.append(f"{path}:{line}: {mine} imports {imported}")
    return found


# ---- layers --------------------------------------------------------------------------------


def test_every_module_has_its_layer():
    assert not [name for name in modules() if entry(name) is None], "add them to LAYERS"


def test_imports_point_down():
    assert not [line for name, path in modules().items() for line in imports_upward(name, path)]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("fastpeft.config.x", "from fastpeft.runs import store"),
        ("fastpeft.config.x", "from ..runs.store import Result"),
        ("fastpeft.runs.x", "def f():\n    import fastpeft.trainer.loop as loop"),
        ("fastpeft.runs.x", "from fastpeft import load_run"),
        ("fastpeft.runs.x", "import fastpeft"),
        ("fastpeft.models.x", "from fastpeft import trainer"),
        ("fastpeft.models.x", "if TYPE_CHECKING:\n    from fastpeft.tasks.base import Task"),
        ("fastpeft.schedules.x", "from fastpeft.adapters.adapter import Adapter"),
        ("fastpeft.tasks.x.task", "from fastpeft.compare import comparison"),
        ("fastpeft.export.x", "from fastpeft.compare.problem_sets import score"),
        ("fastpeft.trainer.x", "if True:\n    from fastpeft.cli.result_tables import closing_table"),
        ("fastpeft.cli.x", "from fastpeft.standins import build_qwen3"),
    ],
)
def test_an_import_that_points_up_is_found(name, line, tmp_path):
    (tmp_path / "x.py").write_text(line)
    assert len(imports_upward(name, tmp_path / "x.py")) == 1


@pytest.mark.parametrize("line", ["from fastpeft.models import inject", "import torch", "from .base import Adapter"])
def test_an_import_that_points_down_is_none_of_them(line, tmp_path):
    (tmp_path / "x.py").write_text(line)
    assert not imports_upward("fastpeft.adapters.x", tmp_path / "x.py")


def test_kernels_import_nothing_of_the_rest():
    for name, path in modules().items():
        if entry(name) == "fastpeft.kernels":
            for imported, line in imports(name, path):
                ours = imported.partition(".")[0] == "fastpeft"
                assert not ours or entry(imported) == "fastpeft.kernels", f"{path}:{line} imports {imported}"


def test_kernels_are_imported_under_one_name_only():
    for name, path in modules().items():
        for imported, line in imports(name, path):
            assert imported.partition(".")[0] != "kernels", f"{path}:{line} imports {imported}"


def test_the_checker_sees_every_way_to_import(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import a.b as c\ndef f():\n    from . import d\n    from ..e import f\nfrom g import h, i\n")
    found = [name for name, _ in imports("fastpeft.config.x", path)]
    assert sorted(found) == ["a.b", "fastpeft.config.d", "fastpeft.e.f", "g.h", "g.i"]
    assert entry("fastpeft.runs.store.Result") == "fastpeft.runs"
    assert entry("fastpeft.standins.build_qwen3.main") == "fastpeft.standins.build_qwen3"
    assert entry("fastpeft") == "fastpeft"


# ---- files ---------------------------------------------------------------------------------


def test_no_two_files_need_each_other():
    assert circles(file_graph(modules())) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "from p.b import f", "b": "from p.c import f", "c": "from p.a import f"}, [{"p.a", "p.b", "p.c"}]),
        ({"a": "if TYPE_CHECKING:\n    from p.b import F", "b": "def f():\n    from p import a"}, [{"p.a", "p.b"}]),
        ({"a": "from p.b import f", "b": "from p.c import f", "c": ""}, []),
        ({"__init__": "from p.a import f", "a": "import p\np.b.g()", "b": ""}, []),
        ({"__init__": "from p.a import f", "a": "import p\np.f()"}, [{"p", "p.a"}]),
        ({"__init__": "from p.a import f", "a": "from p import f"}, [{"p", "p.a"}]),
        ({"__init__": "from p.a import f", "a": "from p import b", "b": ""}, []),
        ({"a": "from p.b import f", "b": "import p.a", "c": "from p.d import f", "d": "from .c import f"},
         [{"p.a", "p.b"}, {"p.c", "p.d"}]),
    ],
)  # fmt: skip
def test_a_circle_of_files_is_found(files, expected, tmp_path):
    (tmp_path / "p").mkdir()
    for name, text in ({"__init__": ""} | files).items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    assert circles(file_graph(modules(tmp_path / "p"))) == expected


def test_a_file_name_stands_once():
    places = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        folder = path.parent.relative_to(PACKAGE).as_posix()
        if not fnmatch(folder, SHARED_FILE_NAMES.get(path.name, "")):
            places[path.name].append(folder)
    assert not {name: folders for name, folders in places.items() if len(folders) > 1}


# ---- torch ---------------------------------------------------------------------------------


def test_what_a_display_needs_imports_no_torch():
    """At the head of the file for the command line, which trains later; nowhere at all for the rest."""
    for name, path in modules().items():
        if entry(name) not in WITHOUT_TORCH:
            continue
        for imported, line in imports(name, path):
            banned = TORCH - {"numpy"} if entry(name) == "fastpeft.tui" else TORCH
            assert imported.partition(".")[0] not in banned, f"{path}:{line} imports {imported}"


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return TORCH & set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["config", "runs.events", "runs.store", "runs.system", "trackers", "standins", "cli", "cli.console", "kernels"],
)
def test_importing_it_loads_no_torch(module):
    assert loaded_by(f"fastpeft.{module}") == set()


@pytest.mark.parametrize("module", ["runs_index", "tail", "widgets.plot", "widgets.heatmap", "program"])
def test_the_terminal_ui_loads_numpy_and_no_torch(module):
    assert loaded_by(f"fastpeft.tui.{module}") == {"numpy"}
