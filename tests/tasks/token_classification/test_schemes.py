"""Schemes of tags: found, brought to IOB2, and what breaks them counted."""

import random

import pytest

from fastpeft.data.rows import DataError
from fastpeft.tasks.token_classification.conll import read_conll
from fastpeft.tasks.token_classification.schemes import detect_scheme, label_names, to_iob2
from tests.support.tagged_sentences import WNUT17, iob1_file, spans, tagged

# One text in each scheme: a long X, a short X right behind it, a short Y, and a Y at the end.
IN_ALL = {
    "iob2": "O B-X I-X I-X B-X B-Y O B-Y I-Y",
    "iob1": "O I-X I-X I-X B-X I-Y O I-Y I-Y",
    "iobes": "O B-X I-X E-X S-X S-Y O B-Y E-Y",
    "bilou": "O B-X I-X L-X U-X U-Y O B-Y L-Y",
}


@pytest.mark.parametrize("scheme", IN_ALL)
@pytest.mark.parametrize("ask", ["auto", "scheme"])
def test_every_scheme_is_found_and_comes_out_as_the_same_iob2(scheme, ask):
    read = to_iob2(tagged(IN_ALL[scheme]), "auto" if ask == "auto" else scheme)
    assert read.scheme == scheme
    assert read.sentences.tags == [IN_ALL["iob2"].split()]
    assert (read.types, read.num_entities, read.num_illegal) == (("X", "Y"), 4, 0)


@pytest.mark.parametrize("scheme", ["iob1", "iobes", "bilou"])
def test_random_entities_survive_the_way_through_every_scheme(scheme, seed):
    rng = random.Random(seed)
    lines, wanted = [], []
    for _ in range(200):
        line, iob2, before = [], [], ""
        for _ in range(rng.randint(1, 6)):
            name, length = rng.choice(["", "", "X", "Y-Z"]), rng.randint(1, 4)
            if not name:
                line, iob2 = line + ["O"] * length, iob2 + ["O"] * length
            elif scheme == "iob1":
                line += [f"{'B' if before == name else 'I'}-{name}", *[f"I-{name}"] * (length - 1)]
            else:
                end, single = ("E", "S") if scheme == "iobes" else ("L", "U")
                line += (
                    [f"B-{name}", *[f"I-{name}"] * (length - 2), f"{end}-{name}"]
                    if length > 1
                    else [f"{single}-{name}"]
                )
            if name:
                iob2 += [f"B-{name}", *[f"I-{name}"] * (length - 1)]
            before = name
        lines.append(" ".join(line))
        wanted.append(iob2)
    read = to_iob2(tagged(*lines), "auto")
    assert (read.scheme, read.num_illegal) == (scheme, 0)
    assert read.sentences.tags == wanted
    assert read.num_entities == sum(len(spans(tags)) for tags in wanted)


@pytest.mark.parametrize(
    ("line", "scheme", "iob2", "num_illegal"),
    [
        ("B-X O I-X I-X", "iob2", "B-X O B-X I-X", 1),
        ("B-X I-Y B-X", "iob2", "B-X B-Y B-X", 1),
        ("I-X I-X O B-X", "iob1", "B-X I-X O B-X", 1),
        ("B-X O S-X I-X", "iobes", "B-X O B-X B-X", 3),
        ("B-X E-Y S-X", "iobes", "B-X B-Y B-X", 1),
        ("B-X L-X L-X U-X", "bilou", "B-X I-X B-X B-X", 1),
        ("U-X B-X", "bilou", "B-X B-X", 1),
    ],
)
def test_what_breaks_the_scheme_begins_an_entity_and_is_counted(line, scheme, iob2, num_illegal):
    read = to_iob2(tagged(line), scheme)
    assert read.sentences.tags == [iob2.split()]
    assert read.num_illegal == num_illegal


def test_the_note_says_what_was_read_and_where_the_scheme_first_broke():
    read = to_iob2(tagged("O B-X", "B-X O I-X", "O I-Y"))
    assert read.note == (
        "here: tags are IOB2: 4 entities of 2 types; 2 tags break the scheme, first I-X on word 3, 'w3', of the "
        "sentence at here:2: where an entity cannot go on, one begins"
    )
    assert to_iob2(tagged("I-X O")).note == "here: tags are IOB1, read as IOB2: 1 entity of 1 type"


def test_a_few_stray_tags_do_not_turn_iob2_into_iob1_nor_back():
    assert detect_scheme(tagged("B-X I-X", "B-X O", "O I-X")) == "iob2"
    assert detect_scheme(tagged("I-X I-X", "I-X O", "O B-X")) == "iob1"
    assert detect_scheme(tagged("O O")) == "iob2"


def test_types_without_a_prefix_are_entities_of_neighbouring_words():
    read = to_iob2(tagged("PER PER O LOC", "PER LOC LOC O"))
    assert read.scheme == "io"
    assert read.sentences.tags == [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "B-LOC", "I-LOC", "O"]]
    assert "neighbouring words of one type are one entity" in read.note
    assert to_iob2(tagged("PER O"), "io").num_entities == 1


def test_prefixes_alone_are_entities_of_one_kind():
    read = to_iob2(tagged("B I O B"))
    assert read.sentences.tags == [["B-ENTITY", "I-ENTITY", "O", "B-ENTITY"]]


def test_a_type_may_hold_hyphens():
    assert to_iob2(tagged("B-creative-work I-creative-work O")).types == ("creative-work",)


@pytest.mark.parametrize(
    ("line", "scheme", "message"),
    [
        ("NN VB DT", "auto", "none is O.*dataset.columns.label"),
        ("B-X PER O", "auto", "PER on word 2, 'w2', of the sentence at here:1 is no tag of IOB1"),
        (
            "B-X S-X O L-X",
            "auto",
            "L-X on word 4, 'w4', of the sentence at here:1 is of BILOU, but others are of IOBES",
        ),
        ("B-X S-X", "iob2", "S-X on word 2.*is no tag of IOB2.*dataset.scheme=auto"),
        ("B-X U-X", "iobes", "U-X on word 2.*is no tag of IOBES"),
        ("PER O", "iob1", "PER on word 1.*is no tag of IOB1"),
    ],
)
def test_tags_that_fit_no_scheme_are_named(line, scheme, message):
    with pytest.raises(DataError, match=message):
        to_iob2(tagged(line), scheme)


def test_labels_are_o_then_the_sorted_types_of_all_splits():
    assert label_names(("PER", "LOC"), ("MISC", "PER")) == ("O", "B-LOC", "I-LOC", "B-MISC", "I-MISC", "B-PER", "I-PER")
    assert label_names() == ("O",)


def test_iob1_files_give_the_entities_that_stand_in_them(tmp_path):
    read = to_iob2(read_conll(iob1_file(tmp_path / "train.conll", 60)))
    found = [name for tags in read.sentences.tags for _, _, name in spans(tags)]
    assert read.scheme == "iob1"
    assert (found.count("PER"), found.count("LOC"), read.num_illegal) == (60 + 12, 60, 0)
    assert "tags are IOB1, read as IOB2: 132 entities of 2 types" in read.note


@pytest.mark.skipif(not WNUT17.is_dir(), reason="the shared WNUT-17 files are not there")
def test_wnut17_is_clean_iob2():
    sentences = read_conll(WNUT17 / "wnut17train.conll")
    read = to_iob2(sentences)
    assert (read.scheme, read.num_illegal, read.num_entities) == ("iob2", 0, 1975)
    assert read.sentences.tags == sentences.tags
    assert read.types == ("corporation", "creative-work", "group", "location", "person", "product")
