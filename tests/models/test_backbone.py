"""Loading: heads, dtypes, broken folders, and code in a repository that must never run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastpeft.config.schema import AdapterConfig, ModelConfig
from fastpeft.errors import UnavailableError
from fastpeft.models.backbone import Backbone
from fastpeft.models.inject import inject_lora
from fastpeft.standins import PATHS
from tests.support.classifiers import load_backbone
from tests.support.tiny import FAMILIES, MAX_POSITIONS, NUM_LAYERS, make_model

CPU = torch.device("cpu")
LABELS = ("no", "maybe", "yes")
HEADS = {
    "deberta-v2": ["pooler", "classifier"],
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
}


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Backbone:
    return load_backbone(ModelConfig(name=str(folder)), LABELS, dtype, CPU)


def inputs(backbone: Backbone) -> dict[str, torch.Tensor]:
    batch = backbone.tokenizer(["the dog ran", "a cat"], ["some bird slept", "no"], padding=True, return_tensors="pt")
    return {name: tensor for name, tensor in batch.items() if backbone.reads_segments or name != "token_type_ids"}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(model_folders, family):
    backbone = load(model_folders[family])
    model = backbone.model
    assert backbone.head == HEADS[family]
    assert backbone.reads_segments == (family == "bert")
    assert backbone.max_positions == (None if family == "deberta-v2" else MAX_POSITIONS)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.num_labels == 3
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {name: i for i, name in enumerate(LABELS)}
    assert model(**inputs(backbone)).logits.shape == (2, 3)


def test_segments_are_those_that_the_tokenizer_gives(tmp_path):
    """Where it names none, whoever loads the model later leaves them at 0."""
    folder = make_model(tmp_path, "bert")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["model_input_names"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert not load(folder).reads_segments


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_weights_are_the_checkpoint(model_folders, family):
    from safetensors.torch import load_file

    saved = load_file(model_folders[family] / "model.safetensors")
    backbone = load(model_folders[family])
    encoder = getattr(backbone.model, backbone.model.base_model_prefix).state_dict()
    shared = encoder.keys() & saved.keys()
    assert len(shared) > 16 * NUM_LAYERS
    assert all(torch.equal(encoder[name], saved[name]) for name in shared)
    fresh = {name for name in encoder if name not in saved}
    assert not fresh


def test_fresh_head_comes_from_torchs_seed(model_folders, seed):
    def classifier(seed):
        torch.manual_seed(seed)
        return load(model_folders["bert"]).model.classifier.weight

    assert torch.equal(classifier(seed), classifier(seed))
    assert not torch.equal(classifier(seed), classifier(seed + 1))


def test_a_pooler_without_weights_is_part_of_the_head(tmp_path):
    backbone = load(make_model(tmp_path, "bert", masked_lm=True))
    assert backbone.head == ["classifier", "bert.pooler"]


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_lm_checkpoint(tmp_path, family):
    backbone = load(make_model(tmp_path, family, masked_lm=True))
    assert backbone.model(**inputs(backbone)).logits.isfinite().all()


def test_finished_classifier_with_other_labels_gets_a_new_head(tmp_path, model_folders):
    """A checkpoint with a head for two labels: the encoder is kept, the head is drawn anew."""
    import transformers

    source = model_folders["roberta"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    shutil.copytree(source, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    backbone = load(tmp_path / "model")
    assert backbone.head == ["classifier"]
    assert backbone.model(**inputs(backbone)).logits.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked_lm", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes_with_a_head_in_fp32(tmp_path, family, masked_lm, dtype):
    """Forward and backward, bare and with LoRA around it."""
    folder = make_model(tmp_path, family, masked_lm=masked_lm)
    torch.manual_seed(0)
    exact = load(folder)
    torch.manual_seed(0)
    backbone = load(folder, dtype)
    for name, parameter in backbone.model.named_parameters():
        in_head = any(name.startswith(f"{head}.") for head in backbone.head)
        assert parameter.dtype == (torch.float32 if in_head else dtype), name
    batch = inputs(backbone)
    want, logits = exact.model(**batch).logits, backbone.model(**batch).logits
    assert logits.dtype == torch.float32
    limit = 1e-6 if dtype == torch.float32 else 0.1
    assert float((logits - want).norm() / want.norm()) < limit
    model, blocks = inject_lora(backbone, AdapterConfig(target_modules="all-linear"))
    model.train()
    model(**batch).logits.square().sum().backward()
    assert all(block.lora_b.grad.isfinite().all() and block.lora_b.grad.any() for block in blocks)
    heads = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert len(heads) >= 2
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in heads)


@pytest.mark.parametrize("name", PATHS)
def test_shipped_models(name):
    backbone = load(f"embedded/{name.replace('_', '-')}")
    assert backbone.model(**inputs(backbone)).logits.isfinite().all()


# ---- what cannot be loaded -----------------------------------------------------------------


def refusal(folder: Path | str) -> str:
    with pytest.raises(UnavailableError) as error:
        load(folder)
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folder(tmp_path):
    assert str(tmp_path / "absent") in refusal(tmp_path / "absent")


def test_unknown_shipped_model():
    assert "embedded/deberta-tiny" in refusal("embedded/nothing")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(tmp_path, model_folders, missing):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    (folder / missing).unlink()
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights(tmp_path, model_folders, keep):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00garbage"])
def test_garbage_in_a_file(tmp_path, model_folders, file, content):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    (folder / file).write_bytes(content)
    assert str(folder) in refusal(folder)


def test_weights_of_another_model(tmp_path, model_folders):
    """Every encoder weight would be random: that is an error and not a fresh head."""
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    shutil.copy(model_folders["distilbert"] / "model.safetensors", folder)
    assert "weights of the encoder" in refusal(folder)


def test_weights_of_another_size(tmp_path, model_folders):
    """`ignore_mismatched_sizes` is for the head; it must not let a random encoder pass."""
    folder = make_model(tmp_path / "model", "bert", hidden_size=48)
    shutil.copy(model_folders["bert"] / "model.safetensors", folder)
    assert "weights of the encoder" in refusal(folder)


def test_tokenizer_without_padding(tmp_path, model_folders):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no padding token" in refusal(folder)


# ---- code in a repository ------------------------------------------------------------------


def plant_code(folder: Path, marker: Path) -> None:
    """A module that writes `marker` when it is imported, named by both configs' auto_map."""
    (folder / "planted.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast\n"
        "class Config(BertConfig): pass\n"
        "class Model(BertForSequenceClassification): config_class = Config\n"
        "class Tokenizer(BertTokenizerFast): pass\n"
    )
    maps = {
        "config.json": {
            "AutoConfig": "planted.Config",
            "AutoModel": "planted.Model",
            "AutoModelForSequenceClassification": "planted.Model",
        },
        "tokenizer_config.json": {"AutoTokenizer": [None, "planted.Tokenizer"]},
    }
    for file, auto_map in maps.items():
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {"auto_map": auto_map}))


@pytest.mark.parametrize("known_type", [True, False])
def test_code_in_the_folder_never_runs(tmp_path, model_folders, monkeypatch, known_type):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    marker = tmp_path / "ran"
    plant_code(folder, marker)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to any question whether to trust it
    if known_type:
        assert type(load(folder).model).__module__.startswith("transformers.")
    else:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"model_type": "planted"}))
        refusal(folder)
    assert not marker.exists()


def test_pickled_weights_never_run(tmp_path, model_folders):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Planted:
        def __reduce__(self):
            return open, (str(marker), "w")

    torch.save({"weight": Planted()}, folder / "pytorch_model.bin")
    refusal(folder)
    assert not marker.exists()
