"""Models by name, from a hub on loopback and from the cache that they leave behind."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch

from fastpeft import hub
from fastpeft.config import load_run
from fastpeft.config.schema import ModelConfig
from fastpeft.errors import UnavailableError
from fastpeft.models.backbone import Backbone
from fastpeft.models.files import cached_model, fetch_model
from fastpeft.trainer.resolve import resolve
from tests.support.classifiers import load_backbone
from tests.support.hub_files import GLUE, MODEL, deberta_files, glue_files


@pytest.fixture(scope="module")
def deberta() -> dict[str, bytes]:
    return deberta_files()


def load(revision: str = "main") -> Backbone:
    config = ModelConfig(name=MODEL, revision=revision)
    return load_backbone(config, ("no", "yes"), torch.float32, torch.device("cpu"))


def refusal(name: str = MODEL, revision: str = "main") -> str:
    with pytest.raises(UnavailableError) as error:
        fetch_model(name, revision)
    assert error.value.exit_code == 3
    return str(error.value)


def cache_of(name: str = MODEL) -> Path:
    return Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def state(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(files["pytorch_model.bin"]), weights_only=True)


# ---- what is loaded ------------------------------------------------------------------------


def test_a_repository_with_spm_and_bin_files_only(deberta, fake_hub):
    sha = fake_hub.add("model", MODEL, deberta).refs["main"]
    backbone = load()
    wanted = state(deberta)
    got = backbone.model.deberta.state_dict()
    assert all(torch.equal(got[name], wanted[f"deberta.{name}"]) for name in got)
    assert sorted(backbone.head) == ["classifier", "pooler"]
    assert set(fake_hub.downloads()) == {
        "config.json",
        "generator_config.json",
        "tokenizer_config.json",
        "spm.model",
        "pytorch_model.bin",
    }
    assert fake_hub.downloads()[-1] == "pytorch_model.bin"
    assert cached_model(MODEL, "main") == cache_of() / "snapshots" / sha
    assert backbone.model.name_or_path == MODEL  # and no folder of this machine


def test_the_tokenizer_is_that_of_sentencepiece(deberta, fake_hub):
    import sentencepiece

    fake_hub.add("model", MODEL, deberta)
    tokenizer = load().tokenizer
    pieces = sentencepiece.SentencePieceProcessor(model_proto=deberta["spm.model"])
    for text in ("the dog ran", "a very  good film", "some birds saw the plot twice"):
        assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text), 2]
    assert tokenizer.pad_token_id == 0


def test_the_second_time_nothing_is_asked(deberta, fake_hub):
    fake_hub.add("model", MODEL, deberta)
    first = load().model.deberta.state_dict()
    fake_hub.requests.clear()
    again = load().model.deberta.state_dict()
    assert fake_hub.requests == []
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_pinned_revisions(deberta, fake_hub):
    repository = fake_hub.add("model", MODEL, deberta)
    first = repository.refs["v1"] = repository.refs["main"]
    other = deberta_files(seed=1)
    second = repository.commit(other)
    for revision, files in ((first, deberta), ("main", other), ("v1", deberta), (second, other)):
        name = "embeddings.word_embeddings.weight"
        assert torch.equal(load(revision).model.deberta.get_parameter(name), state(files)[f"deberta.{name}"])
    fake_hub.repositories.clear()
    for revision in (first, "main", "v1", second):
        assert cached_model(MODEL, revision) is not None
    assert cached_model(MODEL, "v2") is None
    assert cached_model(MODEL, "0" * 40) is None


def test_safetensors_are_preferred_and_shards_belong_together(fake_hub):
    index = json.dumps({"weight_map": {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}).encode()
    shards = {f"model-0000{i}-of-00002.safetensors": b"shard" for i in (1, 2)}
    files = {"config.json": b"{}", "vocab.txt": b"a", "model.safetensors.index.json": index, **shards}
    fake_hub.add("model", "a/shards", files | {"pytorch_model.bin": b"old", "onnx/model.onnx": b"big"})
    folder = fetch_model("a/shards", "main")
    assert {path.name for path in folder.iterdir()} == set(files)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert cached_model("a/shards", "main") is None
    assert fetch_model("a/shards", "main") == folder
    assert cached_model("a/shards", "main") == folder


@pytest.mark.parametrize("text", ['{"weight_map": {"a"', "{}", "[]", '{"weight_map": 1}'])
def test_a_damaged_index_is_no_whole_model(text, fake_hub):
    files = {"config.json": b"{}", "vocab.txt": b"a", "model.safetensors.index.json": text.encode()}
    fake_hub.add("model", "a/damaged", files)
    fetch_model("a/damaged", "main")
    assert cached_model("a/damaged", "main") is None


@pytest.mark.parametrize("lost", ["config.json", "spm.model", "pytorch_model.bin"])
def test_a_cache_that_lacks_a_file_is_completed(lost, deberta, fake_hub):
    fake_hub.add("model", MODEL, deberta)
    folder = fetch_model(MODEL, "main")
    (folder / lost).unlink()
    assert cached_model(MODEL, "main") is None
    fetch_model(MODEL, "main")
    assert (folder / lost).read_bytes() == deberta[lost]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"README.md": b"x"}, "no config.json"),
        ({"config.json": b"{}", "tf_model.h5": b"x"}, "neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_a_repository_that_is_no_model(files, said, fake_hub):
    fake_hub.add("model", "a/b", files)
    assert said in refusal("a/b")


# ---- downloads that break off --------------------------------------------------------------


@pytest.mark.parametrize("fault", ["stall", "cut", "reset", "short"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "tokenizer_config.json"])
def test_a_download_that_breaks_off(file, fault, deberta, fake_hub):
    """Named, never the stand-in, and the next run goes on from there."""
    fake_hub.add("model", MODEL, deberta)
    fake_hub.add("dataset", GLUE, glue_files())
    fake_hub.faults[file] = fault
    run = load_run("lora_rte")
    resolved = resolve(run)
    assert (resolved.run, resolved.stand_in) == (run, False)
    message = refusal()
    assert MODEL in message
    assert f"the download of {file} broke off" in message
    assert "Run the same again" in message
    assert cached_model(MODEL, "main") is None
    assert not [path for path in cache_of().rglob("*.incomplete") if path.stat().st_size]
    fake_hub.faults.clear()
    fake_hub.requests.clear()
    assert (fetch_model(MODEL, "main") / file).read_bytes() == deberta[file]
    assert "config.json" not in fake_hub.downloads()  # it was whole
    load()


def test_a_weights_file_that_is_no_weights_file(deberta, fake_hub):
    fake_hub.add("model", MODEL, deberta | {"pytorch_model.bin": b"no checkpoint"})
    with pytest.raises(UnavailableError, match=f"model.name {MODEL}: cannot be loaded"):
        load()


def test_a_pickle_that_would_run_code_is_not_loaded(deberta, fake_hub, tmp_path):
    """A .bin file is a pickle: only tensors are taken from it."""

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    trap = io.BytesIO()
    torch.save(state(deberta) | {"trap": Trap()}, trap)
    fake_hub.add("model", MODEL, deberta | {"pytorch_model.bin": trap.getvalue()})
    with pytest.raises(UnavailableError):
        load()
    assert not (tmp_path / "ran").exists()


# ---- what the hub says ---------------------------------------------------------------------


def test_a_gated_model(deberta, fake_hub, monkeypatch):
    fake_hub.add("model", MODEL, deberta, gated=True)
    message = refusal()
    assert f"access is restricted. Ask for it at {fake_hub.address}/{MODEL}, then log in" in message
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    assert fetch_model(MODEL, "main").is_dir()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, ""), "no such model, or it is private (error 401)"),
        ((404, "RepoNotFound"), "no such model"),
        ((403, ""), "error 403"),
        ((403, "GatedRepo"), "access is restricted"),
        ((429, ""), "error 429"),
    ],
)
def test_refusals_over_the_wire(answer, said, deberta, fake_hub):
    fake_hub.add("model", MODEL, deberta)
    fake_hub.answers["/api/models/"] = answer
    with pytest.raises(UnavailableError) as error:
        resolve(load_run("lora_rte"))
    assert said in str(error.value)
    assert MODEL in str(error.value)


def test_names_that_are_not_there(deberta, fake_hub):
    fake_hub.add("model", MODEL, deberta)
    assert "no such model, or it is private" in refusal("microsoft/deberta-v3-bse")
    assert "it has no revision 'v9'; model.revision takes" in refusal(MODEL, "v9")
    with pytest.raises(UnavailableError, match=f"dataset {GLUE}: the hub has no such dataset"):
        resolve(load_run("lora_rte"))


def test_a_silent_hub_is_given_up_on_within_five_seconds(fake_hub, monkeypatch):
    assert hub.CHECK_S <= 5
    monkeypatch.setattr(hub, "CHECK_S", 0.3)
    fake_hub.silent = True
    began = time.perf_counter()
    resolved = resolve(load_run("lora_rte"))
    assert time.perf_counter() - began < 2
    assert resolved.stand_in
    assert "cannot be reached" in resolved.reason


def test_an_answer_that_never_ends_is_given_up_on(fake_hub, monkeypatch):
    """Each byte comes in time; all of them do not."""
    monkeypatch.setattr(hub, "CHECK_S", 0.3)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(3))
    began = time.perf_counter()
    with pytest.raises(hub.Unreachable):
        hub.look_up("model", MODEL, "main")
    assert time.perf_counter() - began < 2


def test_model_and_dataset_come_from_the_cache_together(deberta, fake_hub, monkeypatch):
    """Half of a run in the cache does not do without the hub."""
    fake_hub.add("model", MODEL, deberta)
    fake_hub.add("dataset", GLUE, glue_files())
    from fastpeft.tasks import load_task

    run = load_run("lora_rte")
    fetch_model(MODEL, "main")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve(run).stand_in
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    load_task(run.dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fake_hub.requests.clear()
    assert not resolve(run).stand_in
    assert resolve(load_run("lora_sst2")).stand_in
    shutil.rmtree(cache_of())
    assert resolve(run).stand_in
    assert fake_hub.requests == []
