"""Exports of real runs, loaded with transformers and PEFT alone, against the model that the trainer had."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from fastpeft.config import load_run, run_values, save_run
from fastpeft.errors import UnavailableError, UserError
from fastpeft.export import loading, write
from fastpeft.export.exported import Exported
from fastpeft.export.plan import make_plan
from fastpeft.export.summary import closing, opening
from fastpeft.export.write import export
from fastpeft.models.inject import ADAPTER_NAME
from fastpeft.runs.store import RunFolder, read_json
from fastpeft.tasks.sequences.examples import encode
from fastpeft.tasks.sequences.task import sample_logits as logits
from fastpeft.tasks.trained_on import FILE
from tests.support.exported_runs import CASES, Trained
from tests.support.tiny import make_model

CPU = torch.device("cpu")
TOLERANCE = 2e-5


def export_to(folder: Path, run: str, results_dir: Path, **options) -> Exported:
    return export(make_plan(run, results_dir=results_dir, to=folder, **options))


def load_adapter(folder: Path) -> torch.nn.Module:
    """As the export's README says."""
    config = json.loads((folder / "adapter_config.json").read_text())
    torch.manual_seed(12345)
    auto = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(config["base_model_name_or_path"], num_labels=2)
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def load_merged(folder: Path) -> torch.nn.Module:
    torch.manual_seed(12345)
    return transformers.AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()


def assert_answers(model: torch.nn.Module, run: Trained) -> None:
    wanted = run.logits()
    assert wanted.std() > 1e-2  # a model that says nothing would prove nothing
    torch.testing.assert_close(logits(model, run.rows, CPU), wanted, rtol=0, atol=TOLERANCE)


# ---- an adapter, a merged model ------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_in_peft_answers_as_the_trainers_model(case, trained, home, tmp_path):
    exported = export_to(tmp_path / "out", case, home / "results", weights="last")
    assert_answers(load_adapter(tmp_path / "out"), trained[case])
    assert exported.check.difference <= exported.check.tolerance < 1e-2
    assert exported.check.num_rows == 64
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    heads = {name.split(".")[2] for name in saved if ".lora_" not in name}
    wanted = {"deberta-v2": {"pooler", "classifier"}, "distilbert": {"pre_classifier", "classifier"}}
    if case == "bert-without-pooler":
        assert any(name.startswith("base_model.model.bert.pooler.dense.") for name in saved)
    else:
        assert heads == wanted.get(case, {"classifier"})


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_needs_transformers_alone(case, trained, home, tmp_path):
    export_to(tmp_path / "out", case, home / "results", weights="last", merge=True)
    model = load_merged(tmp_path / "out")
    assert_answers(model, trained[case])
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.label2id == {"no": 0, "yes": 1}
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_peft_loads_base_and_adapter_by_the_folder_alone(trained, home, tmp_path, monkeypatch):
    """The stored path of the base model is right from any working folder, though the run's was relative."""
    folder = tmp_path / "results" / "here"
    shutil.copytree(trained["bert"].folder.path, folder)
    monkeypatch.chdir(home)
    values = run_values(load_run(folder / "run.yaml"))
    values["model"]["name"] = "models/bert"
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    export_to(tmp_path / "out", "here", tmp_path / "results", weights="last")
    monkeypatch.chdir(tmp_path)
    auto = peft.AutoPeftModelForSequenceClassification
    assert_answers(auto.from_pretrained(str(tmp_path / "out"), num_labels=2).eval(), trained["bert"])


@pytest.mark.parametrize("merge", [False, True])
def test_the_tokenizer_comes_along_and_reads_alike(merge, trained, home, tmp_path):
    export_to(tmp_path / "out", "roberta", home / "results", merge=merge)
    run = trained["roberta"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    again = encode(run.job.task.texts.validation, tokenizer, 64, segments=False)
    assert again.tokens.tolist() == run.rows.tokens.tolist()


def test_files_can_be_read_by_those_who_can_read_the_folder(trained, home, tmp_path):
    export_to(tmp_path / "out", "bert", home / "results")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "export.json"} <= names


# ---- which weights -------------------------------------------------------------------------


def test_the_best_weights_are_the_default(trained, home, tmp_path, run_copy):
    results = run_copy.path.parent
    for folder, value in ((run_copy.weights("adapter"), 1.0), (run_copy.weights("adapter", best=True), 2.0)):
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.classifier.bias"].fill_(value)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def bias(**options) -> float:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        export_to(out, "copy", results, **options)
        return float(load_file(out / "adapter_model.safetensors")["base_model.model.classifier.bias"][0])

    assert bias() == 2.0
    assert bias(weights="best") == 2.0
    assert bias(weights="last") == 1.0
    shutil.rmtree(run_copy.weights("adapter", best=True))
    assert bias() == 1.0
    with pytest.raises(UserError, match="--last"):
        bias(weights="best")


def test_a_run_may_be_named_or_given_by_its_path(trained, home, tmp_path, monkeypatch):
    by_name = make_plan("bert", results_dir=home / "results", to=tmp_path / "a")
    by_path = make_plan(str(home / "results" / "bert"), results_dir=tmp_path, to=tmp_path / "a")
    assert by_name.source == by_path.source
    monkeypatch.chdir(home / "results" / "bert")
    assert make_plan(".").source.resolve() == by_name.source.resolve()
    assert make_plan("bert", results_dir=home / "results").target == home / "results" / "bert" / "export"


def test_a_run_that_is_still_running_is_exported_and_said_to_be(trained, tmp_path, run_copy):
    result = run_copy.read_result()
    result.status = "running"
    run_copy.write_result(result)
    run_copy.events.touch()
    plan = make_plan("copy", results_dir=run_copy.path.parent)
    assert any("still running" in line for line in opening(plan))
    export(plan)
    assert read_json(plan.target / "export.json")["run_status"] == "running"


def test_a_trainer_that_is_replacing_the_folder_is_waited_for(run_copy, monkeypatch):
    """The trainer removes the old folder and renames the new one into place."""
    plan = make_plan("copy", results_dir=run_copy.path.parent, weights="last")
    away = run_copy.weights("adapter").rename(run_copy.path / "away")
    monkeypatch.setattr(write.time, "sleep", lambda _: away.rename(run_copy.weights("adapter")))
    export(plan)
    assert (plan.target / "adapter_model.safetensors").is_file()


# ---- trimming ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_trimmed_adapter_is_the_truncated_product_in_peft(case, trained, home, tmp_path):
    exported = export_to(tmp_path / "out", case, home / "results", trim=0.9, weights="last")
    model = load_adapter(tmp_path / "out")
    ranks = {}
    for block in trained[case].job.adapter.blocks:
        module = model.base_model.model.get_submodule(block.name)
        dense = block.module.get_delta_weight(ADAPTER_NAME).detach().double()
        u, sigma, v = torch.linalg.svd(dense, full_matrices=False)
        energy = sigma.square().cumsum(0) / sigma.square().sum()
        rank = int((energy < 0.9).sum()) + 1
        ranks[block.name] = rank
        assert module.lora_A[ADAPTER_NAME].weight.shape[0] == module.r[ADAPTER_NAME] == rank
        best = (u[:, :rank] * sigma[:rank]) @ v[:rank]
        torch.testing.assert_close(module.get_delta_weight(ADAPTER_NAME).double(), best, rtol=0, atol=1e-6)
    facts = read_json(tmp_path / "out" / "export.json")["trim"]
    assert {m["name"]: m["rank"] for m in facts["matrices"]} == ranks
    assert len(set(ranks.values())) > 1  # else the patterns are not tried
    assert (facts["rank_total"], facts["rank_min"], facts["rank_max"]) == (
        sum(ranks.values()), min(ranks.values()), max(ranks.values()),
    )  # fmt: skip
    assert exported.mb < exported.mb_before
    correct = (logits(model, trained[case].rows, CPU).argmax(-1).numpy() == trained[case].rows.labels).mean()
    assert exported.metric.after == pytest.approx(float(correct))
    assert exported.metric.before == pytest.approx(trained[case].folder.read_result().metric["value"])
    assert exported.metric.num_rows == len(trained[case].rows)


def test_a_trimmed_merge_is_the_trimmed_adapter(trained, home, tmp_path):
    run = trained["deberta-v2"]
    for name, merge in (("adapter", False), ("merged", True)):
        export_to(tmp_path / name, "deberta-v2", home / "results", trim=0.8, merge=merge)
    adapter, merged = load_adapter(tmp_path / "adapter"), load_merged(tmp_path / "merged")
    answers = logits(merged, run.rows, CPU)
    torch.testing.assert_close(answers, logits(adapter, run.rows, CPU), rtol=0, atol=TOLERANCE)
    assert (answers - run.logits()).abs().max() > 100 * TOLERANCE  # the truncation itself can be seen


def test_all_of_the_energy_changes_nothing(trained, home, tmp_path):
    export_to(tmp_path / "out", "bert", home / "results", trim=1.0, weights="last")
    assert_answers(load_adapter(tmp_path / "out"), trained["bert"])


def test_an_adapter_padded_with_zeros_with_patterns_of_its_own_is_trimmed_to_its_ranks(run_copy, tmp_path):
    """As an AdaLoRA run's plain LORA export is, and rsLoRA's scale with it."""
    file = run_copy.weights("adapter") / "adapter_model.safetensors"
    config = read_json(run_copy.weights("adapter") / "adapter_config.json") | {"use_rslora": True}
    (run_copy.weights("adapter") / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("lora_B.weight"):
            tensors[name][:, 2:] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    exported = export_to(tmp_path / "out", "copy", run_copy.path.parent, trim=1.0, weights="last")
    assert {m.rank for m in exported.trimmed.matrices} == {2}
    trimmed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in (n for n in tensors if n.endswith("lora_A.weight")):
        other = name.replace("lora_A", "lora_B")
        wanted = 12.0 / 4**0.5 * tensors[other] @ tensors[name]
        torch.testing.assert_close(trimmed[other] @ trimmed[name], wanted, rtol=1e-4, atol=1e-6)


# ---- full fine-tuning ----------------------------------------------------------------------


@pytest.fixture
def full_run(trained, tmp_path) -> RunFolder:
    """A run's folder as full fine-tuning leaves it: model/ and model_best/, no adapter."""
    folder = RunFolder.at(tmp_path / "full", "whole")
    source = trained["distilbert"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.job.run.model.name)
    shutil.copytree(source.folder.path, folder.path, ignore=shutil.ignore_patterns("adapter*"))
    for name in ("model", "model_best"):
        model = peft.PeftModel.from_pretrained(
            transformers.AutoModelForSequenceClassification.from_pretrained(
                source.job.run.model.name, num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
            ),
            str(source.folder.weights("adapter")),
        )
        model.merge_and_unload().save_pretrained(str(folder.path / name))
        tokenizer.save_pretrained(str(folder.path / name))
    return folder


def test_a_whole_model_is_copied_with_its_tokenizer(full_run, trained, tmp_path):
    plan = make_plan("whole", results_dir=full_run.path.parent, merge=True, to=tmp_path / "out")
    assert plan.source.name == "model_best"
    export(plan)
    assert_answers(load_merged(tmp_path / "out"), trained["distilbert"])
    assert transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))("the dog")["input_ids"]


@pytest.mark.parametrize(("options", "words"), [({}, "--merge"), ({"merge": True, "trim": 0.9}, "--trim")])
def test_a_whole_model_is_no_adapter(options, words, full_run):
    with pytest.raises(UserError, match=words) as caught:
        make_plan("whole", results_dir=full_run.path.parent, **options)
    assert caught.value.exit_code == 2


# ---- the card ------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_the_code_in_the_card_runs(merge, trained, home, tmp_path, capsys):
    export_to(tmp_path / "out", "bert", home / "results", merge=merge)
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("path/to/this/folder", str(tmp_path / "out")).replace("one text", "the dog " * 200)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip() in ("no", "yes")


def test_the_card_tells_what_it_is(trained, home, tmp_path):
    export_to(tmp_path / "out", "bert", home / "results", trim=0.9)
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "peft"
    assert "base_model" not in head  # a path: the hub would refuse it
    best = trained["bert"].folder.read_result().best
    for words in (f"accuracy {best['value']:.4f}", "labels no, yes", "15 of 15 steps", "rank 4, alpha 12", "trimmed"):
        assert words in card
    assert "STAND-IN" not in card


def test_a_stand_in_says_so_everywhere(home, tmp_path):
    """A run on the shipped model and on its own data: a stand-in all the same."""
    import fastpeft

    values = {"model.name": "embedded/deberta-tiny", "dataset.path": str(home / "pairs"), "dataset.name": "pairs"}
    values |= {"training.precision": "fp32", "training.threads": 1, "budget": "2steps", "evaluation.max_examples": 32}
    fastpeft.train(fastpeft.load_run("lora_mnli", **values), results_dir=tmp_path, name="s")
    plan = make_plan("s", results_dir=tmp_path)
    exported = export(plan)
    assert "STAND-IN" in list(closing(plan, exported))[-1]
    assert "STAND-IN" in (plan.target / "README.md").read_text()
    assert "fastpeft.standins.PATHS" in (plan.target / "README.md").read_text()
    assert "on 32 validation rows |" in (plan.target / "README.md").read_text().split("| metric |")[1]
    assert read_json(plan.target / "export.json")["stand_in"] is True
    base = read_json(plan.target / "adapter_config.json")["base_model_name_or_path"]
    assert (Path(base) / "model.safetensors").is_file()


# ---- faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0001, 99.0, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share, trained, home):
    with pytest.raises(UserError, match="over 0 and at most 1"):
        make_plan("bert", results_dir=home / "results", trim=share)


@pytest.mark.parametrize("name", ["nowhere", "", "../bert", "x" * 5000, "/etc/hostname"])
def test_a_run_that_is_not_there_is_refused_with_those_that_are(name, trained, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="roberta"):
        make_plan(name, results_dir=home / "results")


def test_a_run_without_an_adapter_says_how_to_get_one(run_copy):
    shutil.rmtree(run_copy.weights("adapter"))
    shutil.rmtree(run_copy.weights("adapter", best=True))
    with pytest.raises(UserError, match="--resume --name copy"):
        make_plan("copy", results_dir=run_copy.path.parent)


def test_a_target_that_is_not_empty_is_left_alone(run_copy, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        make_plan("copy", results_dir=run_copy.path.parent, to=target)
    with pytest.raises(UserError, match="is a file"):
        make_plan("copy", results_dir=run_copy.path.parent, to=target / "mine")
    (target / "mine").unlink()
    export_to(target, "copy", run_copy.path.parent)
    with pytest.raises(UserError, match="not empty"):
        make_plan("copy", results_dir=run_copy.path.parent, to=target)


def nothing_left(parent: Path) -> bool:
    return not [path for path in parent.iterdir() if "writing" in path.name or path.name == "out"]


@pytest.mark.parametrize("damage", ["cut", "no config", "no weights", "other type", "other shape"])
def test_a_damaged_adapter_is_refused_and_nothing_is_written(damage, run_copy, tmp_path):
    weights, config = (
        run_copy.weights("adapter", best=True) / n for n in ("adapter_model.safetensors", "adapter_config.json")
    )
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-500])
    elif damage == "no config":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "other type":
        config.write_text(json.dumps({"peft_type": "IA3", "task_type": "SEQ_CLS", "target_modules": ["query"]}))
    else:
        config.write_text(json.dumps(read_json(config) | {"r": 7}))
    with pytest.raises(UserError, match="adapter") as caught:
        export_to(tmp_path / "out", "copy", run_copy.path.parent)
    assert caught.value.exit_code == 2
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("lost", ["head", "update", "scale"])
def test_an_export_that_answers_otherwise_is_an_error(lost, run_copy, tmp_path, monkeypatch):
    """What is written is damaged on its way to the disk."""
    real = write._write_weights

    def damaged(plan, model, backbone, source, out, trimmed):
        real(plan, model, backbone, source, out, trimmed)
        tensors = load_file(out / "adapter_model.safetensors")
        if lost == "head":
            tensors = {n: t for n, t in tensors.items() if "classifier" not in n}
        elif lost == "update":
            name = next(n for n in tensors if "lora_B" in n)
            tensors[name] = tensors[name] * 0
        else:
            config = read_json(out / "adapter_config.json")
            (out / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 13.0}))
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(write, "_write_weights", damaged)
    with pytest.raises(write.CheckError, match="cannot be loaded" if lost == "head" else "differ by up to") as caught:
        export_to(tmp_path / "out", "copy", run_copy.path.parent)
    assert caught.value.exit_code == 1
    assert nothing_left(tmp_path)


def test_a_config_that_says_other_labels_is_an_error(full_run, tmp_path):
    values = run_values(load_run(full_run.config))
    values["dataset"]["labels"] = ["yes", "no"]
    full_run.config.write_text(yaml.safe_dump(values))
    config = read_json(full_run.path / "model_best" / "config.json")
    assert config["id2label"] == {"0": "no", "1": "yes"}
    (full_run.path / FILE).unlink()  # which would have said so already
    result = full_run.read_result()
    result.kind, result.labels = "", []
    full_run.write_result(result)
    with pytest.raises(write.CheckError, match="labels"):
        export_to(tmp_path / "out", "whole", full_run.path.parent, merge=True)
    assert nothing_left(tmp_path)


def test_the_model_that_the_run_was_trained_on_must_be_there(trained, tmp_path, run_copy):
    save_run(load_run(run_copy.config, {"model.name": str(tmp_path / "gone")}), run_copy.config)
    with pytest.raises(UserError, match="gone") as caught:
        export_to(tmp_path / "out", "copy", run_copy.path.parent)
    assert caught.value.exit_code == 3
    assert nothing_left(tmp_path)


def test_weights_of_a_hub_model_are_never_put_on_the_stand_in(run_copy, tmp_path):
    """The run trained on the real model; on the day of the export the hub is away."""
    values = run_values(load_run(run_copy.config))
    values["model"]["name"] = "microsoft/deberta-v3-base"
    values["stand_in"] = {"model": "embedded/deberta-tiny", "dataset": "embedded-nli", "overrides": {}}
    run_copy.config.write_text(yaml.safe_dump(values))
    with pytest.raises(UnavailableError, match="deberta-v3-base"):
        export_to(tmp_path / "out", "copy", run_copy.path.parent)
    assert nothing_left(tmp_path)


def test_another_base_under_the_same_path_shows_in_the_metric(run_copy, tmp_path):
    values = run_values(load_run(run_copy.config))
    values["model"]["name"] = str(make_model(tmp_path / "other", "bert", seed=9))
    run_copy.config.write_text(yaml.safe_dump(values))
    logged = run_copy.read_result().best["value"]
    plan = make_plan("copy", results_dir=run_copy.path.parent, trim=1.0)
    exported = export(plan)
    assert exported.metric.before != pytest.approx(logged)
    assert f"the run logged {logged:.4f}" in "\n".join(closing(plan, exported))


def test_a_target_that_cannot_be_written_is_a_sentence(run_copy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export_to(tmp_path / "file" / "out", "copy", run_copy.path.parent)


def test_a_full_disk_leaves_nothing_behind(run_copy, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_json", full)
    with pytest.raises(UserError, match="No space left"):
        export_to(tmp_path / "out", "copy", run_copy.path.parent)
    assert nothing_left(tmp_path)


def test_exporting_moves_no_global_state(trained, home, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    verbosity = transformers.utils.logging.get_verbosity()
    export_to(tmp_path / "out", "distilbert", home / "results")
    assert torch.equal(torch.get_rng_state(), before)
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_base_on_the_hub_keeps_its_name_and_revision(home):
    from fastpeft.config.schema import ModelConfig

    assert loading.base_name(ModelConfig(name="owner/model", revision="abc")) == ("owner/model", True)
    assert loading.base_name(ModelConfig(name=str(home / "models" / "bert"))) == (str(home / "models" / "bert"), False)
    assert Path(loading.base_name(ModelConfig(name="embedded/deberta-tiny"))[0]).is_absolute()


# ---- the command ---------------------------------------------------------------------------


@pytest.fixture
def command(fastpeft_here):
    return partial(fastpeft_here, "export")


def test_the_command_says_what_it_did(command, trained, home, tmp_path):
    results = ("--results-dir", home / "results")
    code, said, errors = command("roberta", *results, "--to", tmp_path / "out", "--trim", 0.95, "--last")
    assert (code, errors) == (0, "")
    value = trained["roberta"].folder.read_result().metric["value"]
    for words in ("the last weights", f"{value:.4f} before", "largest difference of a logit", "12 matrices", "MB"):
        assert words in said
    assert "STAND-IN" not in said
    assert load_adapter(tmp_path / "out")
    code, said, errors = command("roberta", *results, "--to", tmp_path / "out", "--merge")
    assert (code, said) == (2, "")
    assert "not empty" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "RUN"),
        (("nowhere",), "neither a run"),
        (("bert", "--trim", "0"), "over 0"),
        (("bert", "--trim", "x"), "--trim"),
        (("bert", "--to", "/etc/hostname"), "is a file"),
    ],
)
def test_a_mistake_is_exit_2_and_a_sentence(args, words, command, trained, home):
    code, said, errors = command(*args, "--results-dir", home / "results")
    assert (code, said) == (2, "")
    assert words in errors
    assert "Traceback" not in errors


def test_a_mistake_is_found_before_torch_is_loaded(tmp_path):
    code = (
        "import sys; sys.argv = ['fastpeft', 'export', 'nowhere']\n"
        "from fastpeft.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout == "2 False\n"
