"""Exports for readers other than PEFT, read by those readers' rules, against the model that was trained."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastpeft.adapters import Adapter
from fastpeft.errors import UserError
from fastpeft.export import write
from fastpeft.export.one_rank import path_in_block
from fastpeft.export.plan import CheckError, make_plan
from fastpeft.export.reader_usage import commands
from fastpeft.export.readers import READERS, Contents, check_adapter, fitting_rank
from fastpeft.export.summary import closing
from fastpeft.models.inject import ADAPTER_NAME
from fastpeft.runs.store import RunFolder, read_json
from tests.support.adapter_readers import VLLM_RANKS, Refused, read
from tests.support.causal_runs import (
    PATTERNS,
    READER_CASES,
    answers,
    base_of,
    make_reader_runs,
    make_run,
    wanted_of,
    write_problems,
)

TOLERANCE = 1e-4
ROPE = {"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0}


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    write_problems(folder / "problems")
    return folder


@pytest.fixture(scope="session")
def trained(home) -> dict[str, Adapter]:
    return make_reader_runs(home)


def export_to(folder: Path, case: str, home: Path, **options) -> write.Exported:
    return write.export(make_plan(case, results_dir=home / "results", to=folder, **options))


# ---- what was trained is what is read ----------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", READER_CASES)
def test_the_reader_computes_the_trained_model_and_so_does_peft(case, reader, trained, home, tmp_path, recwarn):
    wanted = wanted_of(case, home, trained)
    assert (wanted - answers(base_of(case, home))).abs().max() > 100 * TOLERANCE  # the update can be seen
    exported = export_to(tmp_path / "out", case, home, reader=reader)
    found = answers(read(reader, tmp_path / "out", base_of(case, home)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert exported.check.difference <= exported.check.tolerance
    plan = make_plan(case, results_dir=home / "results", reader=reader)
    assert f"for       {READERS[reader].name}: every update at rank" in "\n".join(closing(plan, exported))
    if reader != "mlx":
        model = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"))
        assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
        torch.testing.assert_close(answers(model), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("reader", ["vllm", "mlx"])
def test_a_trimmed_adapter_is_padded_to_one_rank(reader, trained, home, tmp_path):
    for name, options in (("peft", {}), ("out", {"reader": reader})):
        exported = export_to(tmp_path / name, "rslora-llama", home, trim=0.9, **options)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "peft"))
    ranks = {module.r[ADAPTER_NAME] for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert len(ranks) > 1
    assert exported.layout.rank == (8 if reader == "vllm" else max(ranks))
    found = answers(read(reader, tmp_path / "out", base_of("rslora-llama", home)))
    torch.testing.assert_close(found, answers(model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("reader", "case"),
    [
        ("vllm", "lora-qwen3"),  # rank 4 is none of its ranks
        ("sglang", "rslora-llama"),
        ("sglang", "lora-llama"),  # key without query
        ("sglang", PATTERNS),
        ("llama.cpp", "rslora-llama"),
        ("llama.cpp", PATTERNS),
    ],
)
def test_pefts_own_form_is_refused_or_read_wrongly_there(reader, case, trained, home, tmp_path):
    """Or the tests above would pass without anything done."""
    export_to(tmp_path / "out", case, home, reader="peft")
    try:
        found = answers(read(reader, tmp_path / "out", base_of(case, home)))
    except Refused:
        return
    assert (found - wanted_of(case, home, trained)).abs().max() > 100 * TOLERANCE


def test_an_adapter_of_one_scale_keeps_its_factors_bit_for_bit(trained, home, tmp_path):
    export_to(tmp_path / "out", "rslora-llama", home, reader="llama.cpp")
    mine = load_file(tmp_path / "out" / "adapter_model.safetensors")
    theirs = load_file(RunFolder.at(home / "results", "rslora-llama").weights("adapter") / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 24, False)  # 12 sqrt(4)
    assert isinstance(config["lora_alpha"], int)


# ---- mlx-lm's files ----------------------------------------------------------------------------


def test_mlx_finds_its_own_two_files(trained, home, tmp_path):
    export_to(tmp_path / "out", "lora-mistral", home, reader="mlx")
    assert read_json(tmp_path / "out" / "adapter_config.json") == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.gate_proj", "self_attn.q_proj"]},
    }
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "out" / "adapters.safetensors").items()}
    assert shapes == {
        "model.layers.0.mlp.gate_proj.lora_a": (64, 4),
        "model.layers.0.mlp.gate_proj.lora_b": (4, 128),
        "model.layers.1.self_attn.q_proj.lora_a": (64, 4),
        "model.layers.1.self_attn.q_proj.lora_b": (4, 64),
    }
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_paths_in_a_block():
    assert path_in_block("model.layers.11.self_attn.q_proj") == "self_attn.q_proj"
    assert path_in_block("layers.0.mlp.up_proj") == "mlp.up_proj"
    assert path_in_block("model.project_in") == "model.project_in"


def test_what_mlx_would_compute_is_compared(trained, home, tmp_path, monkeypatch):
    real = write._write_weights

    def damaged(*args):
        layout = real(*args)
        file = args[4] / "adapters.safetensors"
        save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file)
        return layout

    monkeypatch.setattr(write, "_write_weights", damaged)
    with pytest.raises(CheckError, match="differ by up to"):
        export_to(tmp_path / "out", "lora-qwen3", home, reader="mlx")
    assert not (tmp_path / "out").exists()


# ---- rotary settings ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def far(home) -> Adapter:
    """On a base with a theta and a scaling of its own, saved by transformers 5."""
    adapter = make_run(home, "lora-qwen2")
    folder = home / "models" / "lora-qwen2"
    config = read_json(folder / "config.json")
    assert config is not None
    assert "rope_theta" not in config
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": ROPE}))
    return adapter


def test_a_merged_model_has_its_rotary_settings_where_others_look_for_them(far, home, tmp_path):
    export_to(tmp_path / "out", "lora-qwen2", home, merge=True)
    config = read_json(tmp_path / "out" / "config.json")
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_parameters"] == ROPE
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert model.config.rope_parameters == ROPE
    base = peft.PeftModel.from_pretrained(
        base_of("lora-qwen2", home), str(RunFolder.at(home / "results", "lora-qwen2").weights("adapter"))
    )
    torch.testing.assert_close(answers(model), answers(base), rtol=0, atol=TOLERANCE)


def test_a_base_that_mlx_misreads_is_named(far, home, tmp_path):
    plan = make_plan("lora-qwen2", results_dir=home / "results", to=tmp_path / "out", reader="mlx")
    exported = write.export(plan)
    said = "\n".join(closing(plan, exported))
    assert 'add {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}} there' in said
    assert "rope_parameters only" in (tmp_path / "out" / "README.md").read_text()
    assert read_json(tmp_path / "out" / "export.json")["notes"]
    other = make_plan("lora-qwen2", results_dir=home / "results", to=tmp_path / "other", reader="vllm")
    assert write.export(other).notes == ()


# ---- what a reader cannot hold -----------------------------------------------------------------


def test_a_scaling_that_llama_cpp_leaves_out_is_refused(home, tmp_path):
    make_run(home, "rslora-qwen2")
    file = home / "models" / "rslora-qwen2" / "config.json"
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 32, **scaling}
    file.write_text(json.dumps((read_json(file) or {}) | {"rope_parameters": rope}))
    for merge in (False, True):
        with pytest.raises(
            UserError, match="leaves out the llama3 scaling of the positions of a qwen2 model"
        ) as caught:
            export_to(tmp_path / "out", "rslora-qwen2", home, reader="llama.cpp", merge=merge)
        assert caught.value.exit_code == 2
        assert list(tmp_path.iterdir()) == []


def test_ranks_are_padded_to_those_that_vllm_takes():
    vllm = READERS["vllm"]
    assert [fitting_rank(vllm, rank) for rank in (1, 2, 8, 9, 257, 320, 321)] == [1, 8, 8, 16, 320, 320, 512]
    assert vllm.ranks == VLLM_RANKS
    with pytest.raises(UserError, match=r"513.*at most 512"):
        fitting_rank(vllm, 513)
    assert fitting_rank(READERS["sglang"], 513) == 513


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "bias in B"),
        ({"bias": "lora_only"}, "bias lora_only"),
        ({"trainable_token_indices": [3]}, "single trained tokens"),
    ],
)
def test_more_than_a_plain_update_is_refused(reader, config, words):
    with pytest.raises(UserError, match=words) as caught:
        check_adapter(READERS[reader], Contents(config))
    assert "--merge" in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("head", ["model.embed_tokens.weight", "classifier.dense.weight", "pooler.dense.bias"])
def test_trained_weights_of_its_own_are_refused(reader, head):
    with pytest.raises(UserError, match=re.escape(head.rsplit(".", 1)[0])):
        check_adapter(READERS[reader], Contents({}, (f"base_model.model.{head}",)))


def test_vllm_takes_one_linear_head():
    one = ("base_model.model.score.weight",)
    check_adapter(READERS["vllm"], Contents({}, one))
    both = (*one, "base_model.model.classifier.weight")
    with pytest.raises(UserError, match="classifier, score"):
        check_adapter(READERS["vllm"], Contents({}, both))
    with pytest.raises(UserError, match="no place for any"):
        check_adapter(READERS["sglang"], Contents({}, one))


@pytest.mark.parametrize("damage", ["no config", "no weights", "cut"])
def test_an_adapter_that_cannot_be_read_is_a_sentence(damage, trained, home, tmp_path):
    shutil.copytree(RunFolder.at(home / "results", "lora-qwen3").path, tmp_path / "results" / "copy")
    folder = RunFolder.at(tmp_path / "results", "copy").weights("adapter")
    weights = folder / "adapter_model.safetensors"
    if damage == "no config":
        (folder / "adapter_config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match="adapter") as caught:
        write.export(make_plan("copy", results_dir=tmp_path / "results", to=tmp_path / "out", reader="sglang"))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


# ---- the card ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("merge", [False, True])
def test_the_card_says_how_the_reader_is_given_it(reader, merge, trained, home, tmp_path):
    export_to(tmp_path / "out", "lora-qwen3", home, reader=reader, merge=merge)
    card = (tmp_path / "out" / "README.md").read_text()
    (shell,) = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    assert READERS[reader].name in card
    assert "path/to/this/folder" in shell
    assert (str(home / "models" / "lora-qwen3") in shell) == (not merge)
    assert ("--max-lora-rank 8 " in shell) == (reader == "vllm" and not merge)
    assert ("mlx_lm" in code) == (reader == "mlx")
    library = "transformers" if merge else "mlx" if reader == "mlx" else "peft"
    assert f"library_name: {library}\n" in card
    facts = read_json(tmp_path / "out" / "export.json")
    assert facts["for"] == READERS[reader].name
    rank = 8 if reader == "vllm" else 4
    assert facts["layout"] == (None if merge else {"rank": rank, "scale": 1.0 if reader == "mlx" else 3.0})
    assert math.isclose(facts["check"]["difference"], 0, abs_tol=1e-4)


def test_a_base_on_the_hub_is_named_as_each_reader_wants_it():
    lines = {key: commands(reader, False, "owner/name", "v2", "my run", 8) for key, reader in READERS.items()}
    assert "vllm serve owner/name --revision v2 --enable-lora --max-lora-rank 8" in lines["vllm"]
    assert "--model-path owner/name --revision v2 --lora-paths 'my run'=path/to" in lines["sglang"]
    assert "convert_hf_to_gguf.py --remote owner/name" in lines["llama.cpp"]
    assert "convert_lora_to_gguf.py --base-model-id owner/name" in lines["llama.cpp"]
    assert "--revision" not in commands(READERS["vllm"], False, "owner/name", "main", "r", 8)


# ---- the command -------------------------------------------------------------------------------


def test_the_command_takes_a_reader(fastpeft_here, trained, home, tmp_path):
    args = ("export", "lora-qwen3", "--results-dir", home / "results", "--to", tmp_path / "out")
    code, said, errors = fastpeft_here(*args, "--for", "mlx")
    assert (code, errors) == (0, "")
    assert "for       mlx-lm 0.32.2: every update at rank 4 and scale 1, no patterns" in said
    assert "checked   loaded as mlx-lm does: largest difference of a logit" in said
    code, said, errors = fastpeft_here(*args, "--for", "vlm")
    assert (code, said) == (2, "")
    assert "expected one of peft, vllm, sglang, llama.cpp, mlx; did you mean vllm?" in errors
