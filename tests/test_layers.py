"""Imports point down only, `kernels` stays out of Hugging Face's way, and the packaging names what there is."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module belongs to the longest entry that begins its name, and may import its own
# layer's entry and lower layers. Members of one layer do not import each other.
LAYERS = [
    {"fastpeft._version", "fastpeft.errors", "fastpeft.signals"},
    {"fastpeft.kernels"},
    {"fastpeft.config", "fastpeft.hub"},
    {"fastpeft.runs"},
    {"fastpeft.trackers"},
    {"fastpeft.data"},
    {"fastpeft.models"},
    {"fastpeft.adapters", "fastpeft.schedules", "fastpeft.budget", "fastpeft.evaluate"},
    {"fastpeft.tasks"},
    {"fastpeft.trainer"},
    {"fastpeft.compare.comparison", "fastpeft.compare.figures", "fastpeft.export", "fastpeft.doctor"},
    {"fastpeft.compare.report", "fastpeft.compare.problem_sets"},
    {"fastpeft.sweep", "fastpeft.tui", "fastpeft.cli.console"},
    {"fastpeft.cli.runs_commands"},
    {"fastpeft.cli"},
    {"fastpeft.__main__", "fastpeft"},  # the public face: nothing below may import it
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

WITHOUT_TORCH = {
    "fastpeft", "fastpeft._version", "fastpeft.errors", "fastpeft.config", "fastpeft.runs", "fastpeft.cli",
    "fastpeft.cli.runs_commands",
    "fastpeft.cli.console", "fastpeft.tui", "fastpeft.trackers", "fastpeft.hub",
}  # fmt: skip
TORCH = {"torch", "triton", "transformers", "peft", "datasets", "accelerate", "safetensors", "tokenizers", "numpy"}

SOURCES = {"fastpeft": ROOT / "fastpeft", "fastpeft.kernels": ROOT / "kernels"}


def module_name(path: Path) -> str:
    package, folder = next((p, f) for p, f in SOURCES.items() if path.is_relative_to(f))
    parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_name(path): path for folder in SOURCES.values() for path in folder.rglob("*.py")}


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Full names of all that a module imports, at any depth, with the line."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


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


def run_python(code: str, *flags: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120, **options)


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
        ("fastpeft.schedules.x", "from fastpeft.adapters.adapter import Adapter"),
        ("fastpeft.tasks.sequence_classification.scoring", "from fastpeft.evaluate import compare"),
        ("fastpeft.trainer.x", "if True:\n    from fastpeft.cli.console import closing_table"),
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


def test_what_a_display_needs_imports_no_torch():
    """At the head of the file for the command line, which trains later; nowhere at all for the rest."""
    for name, path in modules().items():
        if entry(name) not in WITHOUT_TORCH:
            continue
        for imported, line in imports(name, path):
            banned = TORCH - {"numpy"} if entry(name) == "fastpeft.tui" else TORCH
            assert imported.partition(".")[0] not in banned, f"{path}:{line} imports {imported}"


def test_the_checker_sees_every_way_to_import(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import a.b as c\ndef f():\n    from . import d\n    from ..e import f\nfrom g import h, i\n")
    found = [name for name, _ in imports("fastpeft.config.x", path)]
    assert sorted(found) == ["a.b", "fastpeft.config.d", "fastpeft.e.f", "g.h", "g.i"]
    assert entry("fastpeft.runs.store.Result") == "fastpeft.runs"
    assert entry("fastpeft.compare.comparison.table") == "fastpeft.compare.comparison"
    assert entry("fastpeft") == "fastpeft"


@pytest.mark.parametrize(
    "package", ["config", "runs.events", "runs.store", "runs.system", "trackers", "console", "cli", "kernels"]
)
def test_importing_it_loads_no_torch(package):
    done = run_python(f"import sys, fastpeft.{package}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not TORCH & set(done.stdout.split())


@pytest.mark.parametrize("module", ["runs", "tail", "widgets.plot", "widgets.heatmap", "app"])
def test_the_terminal_ui_loads_numpy_and_no_torch(module):
    done = run_python(f"import sys, fastpeft.tui.{module}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert TORCH & set(done.stdout.split()) == {"numpy"}


# ---- the folder `kernels` ------------------------------------------------------------------


def has_release_of_kernels() -> bool:
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return False
    return True


def test_transformers_is_imported_from_the_repository_root():
    """It looks for Hugging Face's package `kernels`, and meets our folder of that name on the path."""
    code = (
        "import sys; sys.path.insert(0, '')\n"
        "import transformers\n"
        "from transformers import BertConfig, BertModel\n"
        "import transformers.integrations.hub_kernels\n"
        "tiny = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)\n"
        "BertModel(BertConfig(**tiny))\n"
        "from transformers.utils import is_kernels_available\n"
        "import fastpeft.kernels\n"
        "print(is_kernels_available(), callable(fastpeft.kernels.ops.lora_linear))\n"
    )
    done = run_python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{has_release_of_kernels()} True\n"


def test_kernels_pass_for_no_release_of_the_other_package():
    done = run_python(
        "import sys; sys.path.insert(0, ''); import kernels; print(hasattr(kernels, '__version__'))", cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_checkout_that_is_not_installed_finds_its_kernels(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "fastpeft", tmp_path / "fastpeft", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "import fastpeft, fastpeft.kernels, fastpeft.kernels.ops.frobenius.reference as reference\n"
        "from fastpeft.kernels import weighted_frobenius\n"
        "print(fastpeft.__file__, fastpeft.kernels.__file__, reference.__file__, sep='\\n')\n"
        "print(callable(weighted_frobenius))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *files, works = done.stdout.splitlines()
    assert all(Path(file).is_relative_to(tmp_path) for file in files), files
    assert Path(files[1]) == tmp_path / "kernels" / "__init__.py"
    assert works == "True"


def test_public_kernels_are_functions_before_and_after_their_folders_are_imported():
    from fastpeft import kernels

    for path in sorted((ROOT / "kernels").rglob("*.py")):
        if path.name != "kernel.py":  # when it is first imported decides whether it is interpreted from then on
            __import__(module_name(path))
    for name in kernels.__all__:
        public = getattr(kernels, name)
        assert callable(public), name
        assert not isinstance(public, ModuleType), name
        assert public.__module__.startswith("fastpeft.kernels."), name


def test_a_fresh_process_gets_the_function_though_its_folder_came_first():
    code = (
        "import fastpeft.kernels.ops.lora_linear.op, fastpeft.kernels as k\n"
        "from fastpeft.kernels import lora_linear\n"
        "print(callable(lora_linear), callable(k.lora_linear))"
    )
    done = run_python(code)
    assert done.stdout == "True True\n", done.stderr


def test_a_kernel_that_does_not_exist_is_an_attribute_error():
    from fastpeft import kernels

    with pytest.raises(AttributeError, match="no_such_kernel"):
        kernels.no_such_kernel  # noqa: B018


# ---- packaging -----------------------------------------------------------------------------


def test_the_packaging_lists_every_package_and_no_other():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {module_name(path) for path in modules().values() if path.name == "__init__.py"}
    assert sorted(setuptools["packages"]) == sorted(there)
    for package, folder in setuptools["package-dir"].items():
        assert ROOT / folder == SOURCES[package]


def test_every_folder_with_modules_is_a_package():
    for name, path in modules().items():
        assert (path.parent / "__init__.py").is_file(), name


def test_the_packaging_takes_every_preset_along():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "fastpeft" / "config"
    packed = {path for pattern in data["fastpeft.config"] for path in folder.glob(pattern)}
    assert packed == set(folder.rglob("*.yaml"))
