"""The folder `kernels` stays out of Hugging Face's way, and wheel, sdist and plain checkout hold what there is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import find_packages

from tests.support.import_graph import PACKAGE, ROOT, module_name, modules

NOT_INSTALLED = "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"


def run_python(code: str, *arguments: object, cwd: Path | str = "/") -> str:
    """What a fresh Python prints that knows only `cwd`, of this checkout and of what is installed."""
    command = [sys.executable, "-c", f"import sys\n{NOT_INSTALLED}{code}", *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the folder `kernels` ------------------------------------------------------------------


def has_release_of_kernels() -> bool:
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return False
    return True


def test_every_dependency_has_a_lower_bound_for_the_audit():
    done = subprocess.run([sys.executable, ".ci/floors.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = {line.partition("==")[0] for line in done.stdout.split()}
    assert {"torch", "transformers", "huggingface_hub", "seqeval"} <= named
    assert len(named) == len(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def test_kernels_at_the_root_is_a_link():
    assert os.readlink(ROOT / "kernels") == "fastpeft/kernels"


def test_transformers_is_imported_from_the_repository_root():
    """It looks for Hugging Face's package `kernels`, and meets our link of that name on the path."""
    code = (
        "import transformers\n"
        "from transformers import BertConfig, BertModel\n"
        "import transformers.integrations.hub_kernels\n"
        "tiny = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)\n"
        "BertModel(BertConfig(**tiny))\n"
        "from transformers.utils import is_kernels_available\n"
        "import fastpeft.kernels\n"
        "print(is_kernels_available(), callable(fastpeft.kernels.lora_linear))\n"
    )
    assert run_python(code, cwd=ROOT) == f"{has_release_of_kernels()} True\n"


def test_kernels_pass_for_no_release_of_the_other_package():
    assert run_python("import kernels; print(hasattr(kernels, '__version__'))", cwd=ROOT) == "False\n"


def test_the_checkout_is_no_part_of_the_package():
    code = (
        "from importlib.util import find_spec\n"
        "print([n for n in ('tests', 'bench', 'docs', 'fastpeft') if find_spec(f'fastpeft.{n}')])\n"
    )
    assert run_python(code, cwd=ROOT) == "[]\n"


def test_a_checkout_that_is_not_installed_finds_its_kernels(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(PACKAGE, tmp_path / "fastpeft", ignore=ignore)
    (tmp_path / "kernels").symlink_to(os.readlink(ROOT / "kernels"))
    code = (
        "sys.path.insert(0, sys.argv[1])\n"
        "import fastpeft, fastpeft.kernels, fastpeft.kernels.ops.frobenius.reference as reference\n"
        "from fastpeft.kernels import weighted_frobenius\n"
        "assert callable(weighted_frobenius)\n"
        "print(fastpeft.__file__, fastpeft.kernels.__file__, reference.__file__, sep='\\n')\n"
    )
    package = tmp_path / "fastpeft"
    expected = [package / "__init__.py", package / "kernels" / "__init__.py"]
    expected.append(package / "kernels" / "ops" / "frobenius" / "reference.py")
    assert [Path(line) for line in run_python(code, tmp_path).splitlines()] == expected


def test_public_kernels_are_functions_before_and_after_their_folders_are_imported():
    from fastpeft import kernels

    for path in sorted((PACKAGE / "kernels").rglob("*.py")):
        if path.name != "kernel.py":  # when it is first imported decides whether it is interpreted from then on
            __import__(module_name(path))
    for name in kernels.__all__:
        public = getattr(kernels, name)
        assert callable(public), name
        assert not isinstance(public, ModuleType), name
        assert public.__module__.startswith("fastpeft.kernels."), name


def test_a_kernel_that_does_not_exist_is_an_attribute_error():
    from fastpeft import kernels

    with pytest.raises(AttributeError, match="no_such_kernel"):
        kernels.no_such_kernel  # noqa: B018


# ---- packaging -----------------------------------------------------------------------------


def test_the_packaging_finds_every_package_and_no_other():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert sorted(find_packages(str(ROOT), **settings["packages"]["find"])) == sorted(there)


def test_every_folder_with_modules_is_a_package():
    for name, path in modules().items():
        assert (path.parent / "__init__.py").is_file(), name


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist, built by the build backend from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("distributions")
    tree, out = folder / "tree", folder / "out"
    shutil.copytree(PACKAGE, tree / "fastpeft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("kernels", "tests", "bench", "docs"):
        (tree / name).symlink_to(ROOT / name)
    code = (
        "from setuptools import build_meta\n"
        "out = sys.argv[1]\n"  # which the backend overwrites
        "build_meta.build_sdist(out)\n"
        "build_meta.build_wheel(out)\n"
    )
    run_python(code, out, cwd=tree)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def shipped() -> set[str]:
    """Every file of the package: modules, presets, style sheets, weights."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_holds_every_file_of_the_package_and_no_other(distributions):
    names = zipfile.ZipFile(distributions[0]).namelist()
    assert {name for name in names if ".dist-info/" not in name} == shipped()


def test_the_sdist_holds_every_file_of_the_package(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not shipped() - names


def test_an_unpacked_wheel_works_where_the_package_is_not_installed(distributions, tmp_path):
    zipfile.ZipFile(distributions[0]).extractall(tmp_path)
    code = (
        "import json; sys.path.insert(0, sys.argv[1])\n"
        "import fastpeft.kernels, fastpeft.config\n"
        "from fastpeft import standins\n"
        "assert callable(fastpeft.kernels.weighted_frobenius)\n"
        "weights = [(path / 'model.safetensors').is_file() for path in standins.PATHS.values()]\n"
        "print(json.dumps([fastpeft.__file__, fastpeft.config.preset_names(), weights]))\n"
    )
    file, presets, weights = json.loads(run_python(code, tmp_path))
    assert Path(file) == tmp_path / "fastpeft" / "__init__.py"
    assert sorted(presets) == sorted(path.stem for path in (PACKAGE / "config" / "presets").glob("*.yaml"))
    assert weights
    assert all(weights)
