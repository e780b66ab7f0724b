"""What SECURITY.md promises and no other test shows. Whatever is planted here is harmless: it writes a marker file."""

from __future__ import annotations

import ast
import gzip
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import fastpeft
from fastpeft.compare.found_runs import find_runs
from fastpeft.compare.report import report
from fastpeft.config import load_run
from fastpeft.config.schema import DatasetConfig, ModelConfig
from fastpeft.errors import UserError
from fastpeft.export.loading import load_adapter
from fastpeft.export.plan import find_run
from fastpeft.runs.store import RunError, RunFolder, write_json
from fastpeft.sweep.study import open_storage
from fastpeft.tasks import load_task
from fastpeft.tasks.chat.templates import NAMED
from fastpeft.trainer import train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.resume import open_run
from tests.support.chat_runs import chat_run
from tests.support.classifiers import load_backbone
from tests.support.tiny_runs import tiny_run, write_pairs, write_run

PACKAGE = Path(fastpeft.__file__).parent
CPU = torch.device("cpu")
KEY = "canary0123456789abcdef0123456789abcdef01"


class Planted:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of a few steps; tests copy its folder."""
    home = tmp_path_factory.mktemp("security")
    train(tiny_run(home, method="lora", regulariser={}, budget="4steps"), results_dir=home / "results", name="a")
    return RunFolder.at(home / "results", "a")


@pytest.fixture
def run_copy(finished: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished.path, tmp_path / "results" / "a")
    return RunFolder.at(tmp_path / "results", "a")


# ---- never loaded, never executed ------------------------------------------------------------

RUNS_DATA = {"eval", "exec", "compile"}
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def calls_that_run_data(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in UNPICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLES:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = (
                called in RUNS_DATA
                or (called == "torch.load" and keywords.get("weights_only") != "True")
                or (called == "yaml.load" and ast.unparse(node.args[-1]) != "_Loader")
                or called in ("yaml.unsafe_load", "yaml.full_load")
                or (called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False")
                or keywords.get("trust_remote_code", "False") != "False"
                or keywords.get("shell", "False") != "False"
            )
            if unsafe:
                yield f"{called} in line {node.lineno}"


def test_no_module_unpickles_evaluates_text_or_trusts_remote_code():
    planted = "import pickle\neval(x)\ntorch.load(x)\nyaml.load(x)\nf(trust_remote_code=True)\nrun(c, shell=True)"
    assert len(list(calls_that_run_data(ast.parse(planted)))) == 6
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 200
    found = {path.name: list(calls_that_run_data(ast.parse(path.read_text()))) for path in modules}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "attention", ["kernels-community/flash-attn", "someone/planted@main", {"": "eager", "text_config": "a/planted"}]
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_models_config_that_names_kernels_of_the_hub_is_refused(key, attention, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"inner": {key: attention}}))
    with pytest.raises(UserError, match="is code of a repository, and none is run") as caught:
        load_backbone(ModelConfig(name=str(folder)), ("no", "yes"), torch.float32, CPU)
    assert caught.value.exit_code == 2


def test_a_pickled_adapter_is_not_opened(run_copy, tmp_path):
    folder, marker = run_copy.weights("adapter"), tmp_path / "ran"
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Planted(marker)))
    with pytest.raises(UserError, match="no other file of weights is opened"):
        load_adapter(torch.nn.Linear(2, 2), folder)
    assert not marker.exists()


def test_a_template_does_not_loop_without_end(tmp_path):
    path = tmp_path / "endless.jinja"
    path.write_text("{% for i in range(10 ** 9) %}a{% endfor %}" + NAMED["plain"])
    with pytest.raises(UserError, match="Range too big"):
        build_job(chat_run(tmp_path, dataset={"template": str(path)}))


# ---- never written ---------------------------------------------------------------------------


def written(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_keys_of_the_environment_are_in_no_file_of_a_run(tmp_path, monkeypatch, capfd):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, KEY)
    run = tiny_run(tmp_path, method="lora", regulariser={}, budget="2steps")
    train(run, results_dir=tmp_path / "results", name="a")
    files = list(written(tmp_path / "results"))
    assert {"environment.json", "events.jsonl", "result.json", "run.yaml"} <= {path.name for path in files}
    assert [path.name for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in "".join(capfd.readouterr())


# ---- never followed --------------------------------------------------------------------------

LINKS = ("events.jsonl", ".lock", ".result.json.tmp", "checkpoints", "adapter/adapter_model.safetensors", "figures")


@pytest.mark.parametrize("name", LINKS)
def test_a_run_folder_with_a_link_out_of_it_is_refused(name, run_copy, tmp_path):
    outside = tmp_path / "precious"
    if name in ("checkpoints", "figures"):
        outside.mkdir()
    else:
        outside.write_text("precious")
    link = run_copy.path / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    for command in (lambda: open_run(run_copy, "a"), lambda: find_run("a", run_copy.path.parent)):
        with pytest.raises(RunError, match="leads out of the run's folder") as caught:
            command()
        assert str(outside) in str(caught.value)
    assert outside.is_dir() or outside.read_text() == "precious"


def test_a_sweep_folder_with_a_link_out_of_it_is_refused(tmp_path, fastpeft_here):
    outside, folder = tmp_path / "precious", tmp_path / "results" / "s"
    outside.write_text("precious")
    folder.mkdir(parents=True)
    (folder / "journal.log").symlink_to(outside)
    space = "optuna.space={training.learning_rate: {type: uniform, low: 0.1, high: 0.2}}"
    done = fastpeft_here("sweep", "--run", write_run(tmp_path), "--name", "s", "--trials", 1, space)
    assert "journal.log is a link that leads out of the run's folder" in done.refused()
    assert outside.read_text() == "precious"


def test_a_run_folder_that_is_itself_a_link_and_links_in_it_are_taken(run_copy, tmp_path):
    (run_copy.path / "notes").symlink_to(run_copy.path / "run.yaml")
    (run_copy.path / "wandb").mkdir()
    (run_copy.path / "wandb" / "debug-core.log").symlink_to(tmp_path)  # as W&B does
    (tmp_path / "results" / "b").symlink_to(run_copy.path)
    find_run("b", tmp_path / "results")


def test_a_dataset_folder_with_a_link_out_of_it_is_refused(tmp_path):
    outside = write_pairs(tmp_path / "outside")
    folder = write_pairs(tmp_path / "pairs")
    (folder / "dev.jsonl").unlink()
    (folder / "dev.jsonl").symlink_to(outside / "dev.jsonl")
    with pytest.raises(UserError, match=r"dev\.jsonl: leads out of the dataset's folder, to ") as caught:
        load_task(DatasetConfig(path=str(folder)))
    assert caught.value.exit_code == 2


def test_a_snapshot_in_the_hubs_cache_is_links_that_are_followed(tmp_path):
    repository = tmp_path / "datasets--someone--pairs"
    write_pairs(repository / "blobs")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    for split in ("train", "dev"):
        (repository / "snapshots" / "abc" / f"{split}.jsonl").symlink_to(f"../../blobs/{split}.jsonl")
    assert load_task(DatasetConfig(path=str(repository / "snapshots" / "abc"))).texts.train


# ---- what others made ------------------------------------------------------------------------


def edit(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "imports by name": (lambda f: edit(f, megatron_config={"a": 1}, megatron_core="planted"), "imports a module"),
    "imports its base": (
        lambda f: edit(f, auto_mapping={"base_model_class": "A", "parent_library": "planted"}),
        "imports a module",
    ),
    "of another type": (lambda f: edit(f, peft_type="PROMPT_TUNING", num_virtual_tokens=1), "only LORA"),
    "of no type": (lambda f: edit(f, peft_type="planted"), "cannot be loaded"),
    "no config": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "cannot be loaded"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "cannot be loaded"),
    "a header of 2^60 bytes": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        "cannot be loaded",
    ),
    "cut off": (lambda f: cut_off(f / "adapter_model.safetensors"), "cannot be loaded"),
    "another rank": (lambda f: edit(f, r=64), "cannot be loaded"),
}


@pytest.mark.parametrize("fault", ADAPTERS)
def test_a_malicious_adapter_is_refused(fault, run_copy, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    (tmp_path / "planted.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    run, folder = load_run(run_copy.config), run_copy.weights("adapter")
    base = load_backbone(run.model, ("no", "yes"), torch.float32, CPU).model
    spoil, words = ADAPTERS[fault]
    spoil(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_adapter(base, folder)
    assert caught.value.exit_code == 2
    assert not marker.exists()


def test_a_packed_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    folder = write_pairs(tmp_path / "pairs")
    rows = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(rows + b"\n" * 4_000_000))
    assert load_task(DatasetConfig(path=str(folder))).texts.train
    monkeypatch.setattr("fastpeft.data.text_files._SMALL_BYTES", 1_000_000)
    monkeypatch.setattr("fastpeft.device_memory.free_bytes", lambda device: 6_000_000)
    with pytest.raises(UserError, match=r"train\.jsonl\.gz: unpacks to more than .* GB, half of the memory"):
        load_task(DatasetConfig(path=str(folder)))


@pytest.mark.parametrize(
    "line",
    [b"\x80\x04}.", b"[1]", b'{"op_code": 99, "worker_id": "a"}', b'{"op_code": 0}', b"{" * 5000, pickle.dumps([1])],
)
def test_a_malicious_journal_is_refused(line, tmp_path):
    (tmp_path / "journal.log").write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"journal\.log is no journal of Optuna, or is damaged"):
        open_storage(None, tmp_path)


def test_a_storages_password_is_in_no_file_and_no_message(tmp_path, fastpeft_here):
    url = f"postgresql+psycopg://user:{KEY}@127.0.0.1:1/sweeps"
    run = write_run(tmp_path)
    space = "optuna.space={training.learning_rate: {type: uniform, low: 0.1, high: 0.2}}"
    done = fastpeft_here("sweep", "--run", run, "--storage", url, "--name", "s", "--trials", 1, space)
    assert done.code == 2
    assert "--storage" in done.err
    assert KEY not in done.out + done.err
    assert [path.name for path in written(tmp_path / "results") if KEY.encode() in path.read_bytes()] == []


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.add(tag)


def test_a_results_folder_puts_no_markup_into_the_report(run_copy):
    planted = "<script>planted</script><img src=x onerror=planted>"
    result = json.loads(run_copy.result.read_text())
    write_json(run_copy.result, result | {"run_id": planted, "model": planted, "dataset": planted, "group": planted})
    made = report(find_runs([], run_copy.path.parent), run_copy.path.parent)
    page = next(path for path in written(run_copy.path.parent) if path.suffix == ".html").read_text()
    assert made is not None
    assert "planted" in page
    tags = Tags()
    tags.feed(page)
    assert not {"script", "img"} & tags.found


ESCAPES = "\x1b]0;planted\x07\x1b[2J\u202e"


def test_control_characters_of_a_run_folder_do_not_reach_the_terminal(run_copy, fastpeft_here):
    result = json.loads(run_copy.result.read_text())
    write_json(run_copy.result, result | {"run_id": ESCAPES, "model": ESCAPES, "dataset": ESCAPES})
    for command in (("runs", "ls"), ("runs", "show", "a")):
        done = fastpeft_here(*command, "--results-dir", run_copy.path.parent)
        assert done.code == 0
        assert not set("\x1b\x07\u202e") & set(done.out + done.err)
