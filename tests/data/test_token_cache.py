"""Tokens from the cache are those that were made; what is damaged, half written or another's is made anew."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers

from fastpeft.data import token_cache, tokenise
from fastpeft.data.token_cache import cached, in_use
from fastpeft.tasks.causal_lm.prompts import Prompted, encode_prompts
from fastpeft.tasks.sequences.examples import Encoded, Examples, encode
from fastpeft.tasks.token_classification.encode import encode_sentences
from fastpeft.tasks.token_classification.sentences import Sentences
from tests.support.tiny import WORDS, make_causal_lm, make_model

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"max_length": 12, "segments": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model"), "bert"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def examples(count: int = 40) -> Examples:
    texts = [" ".join(WORDS[i % 5 : 2 + i % 17]) for i in range(count)]
    return Examples(texts, texts[::-1], [i % 2 for i in range(count)])


def encoded(folder: Path, tokenizer: Any, rows: Examples | None = None, **settings: Any) -> tuple[Encoded, list[str]]:
    with in_use(True, folder) as notes:
        return encode(rows or examples(), tokenizer, **(SETTINGS | settings)), notes


def assert_same(one: Any, other: Any) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


def counting(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the tokenizer from here on."""
    calls: list[int] = []
    original = type(tokenizer).__call__

    def call(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(text))
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    return calls


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


# ---- hits and misses -----------------------------------------------------------------------


def test_the_second_time_nothing_is_tokenised(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = encode(examples(), tokenizer, **SETTINGS)
    first, notes = encoded(folder, tokenizer)
    calls = counting(tokenizer, monkeypatch)
    second, _ = encoded(folder, tokenizer)
    assert not calls
    assert notes == []
    assert plain.num_truncated > 0
    assert_same(first, plain)
    assert_same(second, plain)
    assert not list(folder.glob(".*"))


def test_without_it_nothing_is_kept(folder: Path, tokenizer: Any) -> None:
    with in_use(False, folder):
        encode(examples(), tokenizer, **SETTINGS)
    encode(examples(), tokenizer, **SETTINGS)
    assert not folder.exists()


def test_large_arrays_are_mapped_and_not_to_be_written_to(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_MAPPED_BYTES", 200)
    for _ in range(2):
        found, _ = encoded(folder, tokenizer)
        assert isinstance(found.tokens.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            found.tokens[0] = 1


@pytest.mark.parametrize(
    "change", ["text", "order", "pair", "no pair", "max_length", "segments", "cut", "vocabulary", "added", "side"]
)
def test_whatever_tokens_depend_on_is_in_the_key(change: str, folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    encoded(folder, tokenizer)
    rows, other, settings = examples(), copy.deepcopy(tokenizer), {}
    assert rows.text_pair is not None
    if change == "text":
        rows.text[3] += " dog"
    elif change == "order":
        rows.text.reverse()
    elif change == "pair":
        rows.text_pair[-1] = "cat"
    elif change == "no pair":
        rows = Examples(rows.text, None, rows.labels)
    elif change == "vocabulary":
        path = make_model(tmp_path / "other", "bert") / "tokenizer.json"
        path.write_text(path.read_text().replace('"dog"', '"wolf"'))
        other = transformers.AutoTokenizer.from_pretrained(path.parent)
    elif change == "added":
        other.add_tokens(["dog cat"])
    elif change == "side":
        other.truncation_side = "left"
    else:
        settings = {change: {"max_length": 13, "segments": False, "cut": "text"}[change]}
    found, _ = encoded(folder, other, rows, **settings)
    assert len(entries(folder)) == 2
    assert_same(found, encode(rows, other, **(SETTINGS | settings)))


@pytest.mark.parametrize("what", ["version", "format", "code"])
def test_another_version_or_code_reads_nothing_of_it(
    what: str, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def kept(source: Path) -> None:
        names: dict[str, Any] = {"np": np}
        exec(compile(source.read_text(), str(source), "exec"), names)
        with in_use(True, folder):
            cached(names["make"], tokenizer, (["a"],), {})

    source = tmp_path / "kind.py"
    source.write_text("def make():\n    return {'tokens': np.arange(3)}\n")
    for _ in range(2):
        kept(source)
    assert len(entries(folder)) == 1
    if what == "code":
        source.write_text("def make():\n    return {'tokens': np.arange(4)}\n")
    else:
        monkeypatch.setattr(token_cache, {"version": "__version__", "format": "FORMAT"}[what], 99)
    kept(source)
    assert len(entries(folder)) == 2


def test_the_last_call_of_a_tokenizer_is_not_in_the_key(folder: Path, tokenizer: Any) -> None:
    """A fast one remembers how it was last told to cut."""
    other = copy.deepcopy(tokenizer)
    encoded(folder, tokenizer)
    other("dog " * 30, truncation=True, max_length=5, padding="max_length")
    encoded(folder, other)
    assert len(entries(folder)) == 1


def test_a_slow_tokenizer_is_known_by_its_files(folder: Path, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")

    slow = SimpleNamespace(  # what is asked of one
        vocab_files_names={"vocab_file": "vocab.txt"},
        init_kwargs={"vocab_file": str(vocab), "name_or_path": "anywhere"},
        truncation_side="right",
        added_tokens_decoder={},
    )
    with in_use(True, folder):
        for _ in range(2):
            cached(lambda: {"tokens": np.arange(3)}, slow, (["a"],), {})
        assert len(entries(folder)) == 1
        vocab.write_text(vocab.read_text() + "wolf\n")
        cached(lambda: {"tokens": np.arange(4)}, slow, (["a"],), {})
        assert len(entries(folder)) == 2
        vocab.unlink()  # nobody knows what it is made of
        cached(lambda: {"tokens": np.arange(4)}, slow, (["b"],), {})
        assert len(entries(folder)) == 2


def test_language_models_rows_and_tagged_sentences_too(
    folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = transformers.AutoTokenizer.from_pretrained(make_causal_lm(tmp_path / "causal", "qwen3"))
    prompted = Prompted(["a dog", "some cat ran", "no"], [" ran", " slept not", " " + "bird " * 30], str)
    words = [["dog", "saw", "cat"], ["every", "bird", "ran", "big"] * 6]
    tags = [["B-X", "O", "B-X"], ["O", "B-X", "O", "O"] * 6]
    sentences = Sentences(words=words, tags=tags, where=["1", "2"], source="here", num_skipped=0)

    def both() -> list[Any]:
        return [
            encode_prompts(prompted, causal, 10),
            encode_prompts(prompted, causal, 10, training=False),
            encode_sentences(sentences, ["O", "B-X"], tokenizer, 12, segments=True),
        ]

    plain = both()
    with in_use(True, folder):
        first = both()
        assert len(entries(folder)) == 3
        monkeypatch.setattr(tokenise, "tokenised", None)
        second = both()
    for found in (first, second):
        for one, other in zip(found, plain, strict=True):
            assert_same(one, other)
    assert plain[0].notes
    assert plain[2].num_windowed == 1


# ---- what goes wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["byte", "cut", "empty", "gone", "list", "list cut", "list of other things", "pickle", "swapped"]
)
def test_a_damaged_entry_is_made_anew(fault: str, folder: Path, tokenizer: Any) -> None:
    plain, _ = encoded(folder, tokenizer)
    (entry,) = entries(folder)
    tokens, listed = entry / "tokens.npy", entry / "entry.json"
    before = {path.name: path.read_bytes() for path in entry.iterdir()}
    if fault == "byte":
        tokens.write_bytes(before["tokens.npy"][:-1] + bytes([before["tokens.npy"][-1] ^ 1]))
    elif fault == "cut":
        tokens.write_bytes(before["tokens.npy"][:-4])
    elif fault == "empty":
        tokens.write_bytes(b"")
    elif fault == "gone":
        tokens.unlink()
    elif fault == "list":
        listed.unlink()
    elif fault == "list cut":
        listed.write_bytes(before["entry.json"][:-3])
    elif fault == "list of other things":
        listed.write_text("[1]")
    elif fault == "pickle":
        np.save(tokens, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        tokens.write_bytes(before["offsets.npy"])
    found, notes = encoded(folder, tokenizer)
    assert_same(found, plain)
    assert notes == []
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == before


def test_what_a_killed_run_left_is_no_entry_and_goes_in_time(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """It dies between two files of the entry, by a signal that nobody hears of."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys, numpy as np, transformers\n"
        "from pathlib import Path\n"
        "from fastpeft.data import token_cache\n"
        "save, seen = np.save, []\n"
        "def dying(*args, **kwargs):\n"
        "    seen.append(0)\n"
        "    os.kill(os.getpid(), 9) if len(seen) == 2 else save(*args, **kwargs)\n"
        "np.save = dying\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "with token_cache.in_use(True, Path(sys.argv[2])):\n"
        "    token_cache.cached(lambda: {'a': np.arange(3), 'b': np.arange(3)}, tokenizer, (['x'],), {})\n"
    )
    command = [sys.executable, str(script), tokenizer.name_or_path, str(folder)]
    killed = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -9, killed.stderr
    (left,) = folder.iterdir()
    assert left.name.startswith(".")
    encoded(folder, tokenizer)
    assert left.exists()  # it may be being written
    old = time.time() - 2 * 24 * 3600
    os.utime(left, (old, old))
    encoded(folder, tokenizer, max_length=13)
    assert not left.exists()
    assert len(entries(folder)) == 2


def test_two_runs_at_once_leave_one_whole_entry(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is done while this one tokenises."""
    plain = encode(examples(), tokenizer, **SETTINGS)
    write = token_cache._write

    def late(entry: Path, arrays: Any) -> None:
        write(entry, arrays)
        write(entry, arrays)

    monkeypatch.setattr(token_cache, "_write", late)
    found, notes = encoded(folder, tokenizer)
    assert_same(found, plain)
    assert notes == []
    assert len(list(folder.iterdir())) == 1


def test_what_cannot_be_tokenised_leaves_no_entry(folder: Path, tokenizer: Any) -> None:
    def make() -> Any:
        raise ValueError("no")

    with in_use(True, folder), pytest.raises(ValueError, match="no"):
        cached(make, tokenizer, (["a"],), {})
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_said_once(folder: Path, tokenizer: Any) -> None:
    folder.write_text("a file")
    with in_use(True, folder) as notes:
        for length in (12, 13):
            assert len(encode(examples(), tokenizer, length, True)) == 40
    assert len(notes) == 1
    assert notes[0].startswith(f"tokens are not kept in {folder}: ")


def test_without_a_home_folder_it_is_said(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    with in_use(True) as notes:
        assert len(encode(examples(), tokenizer, 12, True)) == 40
    assert notes == ["tokens are not kept: there is no home folder to keep them in; set HOME or XDG_CACHE_HOME"]


def test_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with in_use(True):
        encode(examples(), tokenizer, 12, True)
    assert len(entries(tmp_path / "xdg" / "fastpeft" / "tokens")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert token_cache.cache_folder() == tmp_path / "home" / ".cache" / "fastpeft" / "tokens"


# ---- its size ------------------------------------------------------------------------------


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.*") if path.is_file())


def test_what_was_read_longest_ago_goes_first(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for i, length in enumerate((12, 13, 14)):
        before = set(folder.iterdir()) if folder.exists() else set()
        encoded(folder, tokenizer, max_length=length)
        keys += set(folder.iterdir()) - before
        os.utime(keys[-1], (i, i))
    encoded(folder, tokenizer, max_length=12)  # is read again
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", int(size_of(folder) * 1.1))
    encoded(folder, tokenizer, max_length=15)
    assert not keys[1].exists()
    assert keys[0].exists()
    assert keys[2].exists()
    assert len(entries(folder)) == 3
    assert size_of(folder) <= token_cache.LIMIT_BYTES


def test_an_entry_beyond_the_limit_is_not_kept(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", 100)
    found, _ = encoded(folder, tokenizer)
    assert_same(found, encode(examples(), tokenizer, **SETTINGS))
    assert not folder.exists()


def test_what_is_mapped_outlives_its_entry(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_MAPPED_BYTES", 0)
    found, _ = encoded(folder, tokenizer)
    kept = found.tokens.copy()
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", found.tokens.nbytes + 3000)
    encoded(folder, tokenizer, max_length=13)
    assert len(entries(folder)) == 1
    np.testing.assert_array_equal(found.tokens, kept)


def test_the_list_names_every_file(folder: Path, tokenizer: Any) -> None:
    encoded(folder, tokenizer)
    (entry,) = entries(folder)
    listed = json.loads((entry / "entry.json").read_text())
    assert {f"{name}.npy" for name in listed} == {path.name for path in entry.glob("*.npy")}
    assert listed.keys() == {"tokens", "segments", "offsets", "num_truncated"}
