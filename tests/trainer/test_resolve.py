"""Where model and data come from: local path, cache, hub, stand-in, in this order and together."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub as hub
import pytest
import torch
from huggingface_hub import errors

from fastpeft.config import RunConfig, load_run
from fastpeft.data.rows import DataError
from fastpeft.errors import UnavailableError, UserError
from fastpeft.hub import CHECK_S
from fastpeft.standins import embedded_path
from fastpeft.trainer.resolve import Resolved, resolve
from tests.support.classifiers import load_backbone
from tests.support.tiny import make_model

OWN = {"dataset.name": "own", "dataset.path": __file__}  # a path that is there; nothing reads it


def preset(**overrides: object) -> RunConfig:
    return load_run("lora_mnli", {key.replace("__", "."): value for key, value in overrides.items()})


def with_model(name: Path | str, **fields: object) -> RunConfig:
    """A run on local data, so that only the model has to be found."""
    return load_run("lora_mnli", OWN | {"model.name": str(name)} | fields)


def refusal(run: RunConfig, **options: bool) -> str:
    with pytest.raises(UnavailableError) as error:
        resolve(run, **options)
    assert error.value.exit_code == 3
    return str(error.value)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A hub cache of this test's own."""
    cache = tmp_path / "hub_cache"
    cache.mkdir()
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)

    def fail(*_, **__):
        raise AssertionError("the hub was asked although HF_HUB_OFFLINE is set")

    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    monkeypatch.setattr(hub.HfApi, "dataset_info", fail)


@pytest.fixture
def answers(monkeypatch):
    """A hub that answers with what the test puts in: an exception for a model or a dataset, else yes."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    given: dict[str, Exception] = {}
    calls: list[tuple] = []

    def answer(kind):
        def look(self, name, *, revision=None, timeout=None, **_):
            calls.append((kind, name, revision, timeout))
            if kind in given:
                raise given[kind]
            return SimpleNamespace(sha="0" * 40, siblings=[])

        return look

    monkeypatch.setattr(hub.HfApi, "model_info", answer("model"))
    monkeypatch.setattr(hub.HfApi, "dataset_info", answer("dataset"))
    given["calls"] = calls
    return given


def http_error(kind: type[Exception], status: int) -> Exception:
    return kind("said no", response=SimpleNamespace(status_code=status, headers={}, request=None))


# ---- local ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_local_model_and_data(model_folders):
    run = with_model(model_folders["bert"])
    assert resolve(run) == Resolved(run, stand_in=False, reason="the run itself names it")
    assert not resolve(run, allow_stand_in=False).stand_in


@pytest.mark.usefixtures("offline")
def test_local_folder_by_a_relative_path(model_folders, monkeypatch):
    monkeypatch.chdir(model_folders["bert"].parent)
    assert resolve(with_model("bert")).run.model.name == "bert"


@pytest.mark.usefixtures("offline")
def test_local_model_does_not_make_up_for_missing_data(model_folders):
    """Both are the ones named, or the run ends: no stand-in for half of it."""
    message = refusal(preset(model__name=str(model_folders["bert"])))
    assert "dataset nyu-mll/glue" in message
    assert "overridden" in message


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("name", ["/no/such/model", "./no", "../no/such", "~/no-such-model", "a/b/c"])
def test_path_that_does_not_exist(name):
    assert "no such folder" in refusal(with_model(name))


def test_folder_that_holds_no_model(tmp_path):
    assert "config.json" in refusal(with_model(tmp_path))


# ---- shipped and stand-in ------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_stand_in_for_a_preset():
    run = preset()
    resolved = resolve(run)
    assert resolved.stand_in
    assert "HF_HUB_OFFLINE" in resolved.reason
    assert (resolved.run.model.name, resolved.run.dataset.name) == (run.stand_in.model, run.stand_in.dataset)
    space = run.stand_in.overrides.get("optuna.space", {})
    assert set(space) <= set(resolved.run.optuna.space), "the stand-in's own over the preset's"
    for key, value in run.stand_in.overrides.items():
        if key == "optuna.space":
            continue
        section, name = key.split(".")
        got = getattr(getattr(resolved.run, section), name)
        assert got == type(got)(value), key  # YAML reads 2e-3 as a text
    again = resolve(resolved.run)
    assert again.stand_in
    assert again.run == resolved.run


@pytest.mark.usefixtures("offline")
def test_what_the_user_set_outweighs_the_stand_in():
    run = resolve(preset(training__learning_rate=3e-5, adapter__rank=5)).run
    assert run.training.learning_rate == 3e-5
    assert run.adapter.rank == 5
    assert run.training.epochs == preset().stand_in.overrides["training.epochs"]


@pytest.mark.usefixtures("offline")
def test_no_stand_in():
    assert "--no-stand-in" in refusal(preset(), allow_stand_in=False)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "overrides",
    [
        {"model__name": "microsoft/deberta-v3-bse"},
        {"model__name": "microsoft/deberta-v3-base"},
        {"model__revision": "v2"},
        {"dataset__name": "mnli"},
        {"model__name": "typo/of-a-folder", "dataset__path": __file__},
    ],
)
def test_overridden_names_have_no_stand_in(overrides):
    assert "overridden" in refusal(preset(**overrides))


@pytest.mark.usefixtures("offline")
def test_a_run_that_names_the_stand_in(model_folders):
    shipped = load_run("lora_mnli", {"model.name": "embedded/deberta-tiny", "dataset.name": "embedded-nli"})
    generated = load_run("lora_mnli", {"model.name": str(model_folders["bert"]), "dataset.name": "embedded-nli"})
    problems = load_run(
        "lora_mnli", {"model.name": str(model_folders["bert"]), "dataset.name": "embedded-word-problems"}
    )
    for run in (shipped, generated, problems):
        assert resolve(run) == Resolved(run, stand_in=True, reason="the run itself names it")
        assert "--no-stand-in" in refusal(run, allow_stand_in=False)


def test_names_of_shipped_models():
    assert (embedded_path("embedded/deberta-tiny") / "config.json").is_file()
    assert embedded_path("deberta-tiny") is None
    with pytest.raises(UnavailableError, match="embedded/deberta-tiny"):
        embedded_path("embedded/deberta-tny")


# ---- the hub's cache -----------------------------------------------------------------------


def fill_cache(cache: Path, name: str, revision: str = "main") -> Path:
    """A model in the layout that huggingface_hub leaves behind."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    return make_model(repository / "snapshots" / commit, "bert")


@pytest.mark.usefixtures("offline")
def test_model_in_the_cache(empty_cache):
    fill_cache(empty_cache, "someone/tiny-bert")
    run = with_model("someone/tiny-bert")
    assert resolve(run) == Resolved(run, stand_in=False, reason="the run itself names it")
    backbone = load_backbone(run.model, ("no", "yes"), torch.float32, torch.device("cpu"))
    assert backbone.head == ["classifier"]
    assert "not in the local cache" in refusal(with_model("someone/tiny-bert", **{"model.revision": "v2"}))
    assert "not in the local cache" in refusal(with_model("someone/tiny-bart"))


def test_cache_is_asked_before_the_hub(empty_cache, answers):
    answers["model"] = TimeoutError()
    assert resolve(preset()).stand_in
    fill_cache(empty_cache, "microsoft/deberta-v3-base")
    assert not resolve(preset()).stand_in
    assert answers["calls"][-1][0] == "dataset"
    shutil.rmtree(empty_cache / "models--microsoft--deberta-v3-base")
    assert resolve(preset()).stand_in


# ---- the hub -------------------------------------------------------------------------------


def test_hub_has_both(answers):
    run = preset()
    assert resolve(run) == Resolved(run, stand_in=False, reason="the run itself names it")
    assert [call[:3] for call in answers["calls"]] == [
        ("model", "microsoft/deberta-v3-base", "main"),
        ("dataset", "nyu-mll/glue", "main"),
    ]
    assert all(0 < timeout <= CHECK_S <= 5 for *_, timeout in answers["calls"])


UNREACHABLE = {
    "timeout": TimeoutError("slow"),
    "no route": ConnectionRefusedError("[Errno 111]"),
    "no name": OSError("Name or service not known"),
    "the library's own": type("ProxyError", (Exception,), {})("403 from proxy"),
    "500": http_error(errors.HfHubHTTPError, 500),
    "503": http_error(errors.HfHubHTTPError, 503),
    "offline mode": errors.OfflineModeIsEnabled("offline"),
}


@pytest.mark.parametrize("what", ["model", "dataset"])
@pytest.mark.parametrize("problem", UNREACHABLE.values(), ids=UNREACHABLE)
def test_unreachable_hub_gives_the_stand_in(answers, what, problem):
    answers[what] = problem
    resolved = resolve(preset())
    assert resolved.stand_in
    assert "hub" in resolved.reason
    assert "--no-stand-in" in refusal(preset(), allow_stand_in=False)
    assert "overridden" in refusal(preset(model__name="microsoft/deberta-v3-base"))


NO = {
    "401": (http_error(errors.HfHubHTTPError, 401), "401"),
    "403": (http_error(errors.HfHubHTTPError, 403), "403"),
    "404": (http_error(errors.RepositoryNotFoundError, 404), "no such"),
    "private": (http_error(errors.RepositoryNotFoundError, 401), "private"),
    "gated": (http_error(errors.GatedRepoError, 403), "restricted"),
    "revision": (http_error(errors.RevisionNotFoundError, 404), "no revision 'main'"),
    "name": (errors.HFValidationError("bad name"), "neither a folder nor a name"),
}


@pytest.mark.parametrize("what", ["model", "dataset"])
@pytest.mark.parametrize(("problem", "said"), NO.values(), ids=NO)
def test_a_hub_that_says_no_gives_no_stand_in(answers, what, problem, said):
    """The name is wrong or forbidden: training on something else would hide that."""
    answers[what] = problem
    message = refusal(preset())
    assert said in message
    assert {"model": "deberta-v3-base", "dataset": "nyu-mll/glue"}[what] in message


def test_every_refusal_is_a_user_error():
    assert issubclass(UnavailableError, UserError)


def test_a_dataset_path_that_does_not_exist_is_named_before_the_model_is_looked_for(tmp_path):
    run = load_run("lora_mnli", {"model.name": "org/absent", "dataset.path": str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match=r"nowhere: there is no such file or folder"):
        resolve(run)
