"""CoNLL files: columns, blank lines, marks and comments as real files have them."""

from pathlib import Path

import pytest

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.rows import DataError
from fastpeft.tasks import load_task
from fastpeft.tasks.token_classification.conll import looks_like_conll, read_conll
from tests.support.tagged_sentences import WNUT17, iob1_file


def write(folder: Path, content: str | bytes, name: str = "some.conll") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_word_is_the_first_column_and_the_tag_the_last(tmp_path):
    path = write(tmp_path, "Anna NNP I-NP I-PER\nsleeps VB I-VP O\n\nOslo NNP I-NP I-LOC\n")
    read = read_conll(path)
    assert read.words == [["Anna", "sleeps"], ["Oslo"]]
    assert read.tags == [["I-PER", "O"], ["I-LOC"]]
    assert read.where == [f"{path}:1", f"{path}:4"]
    assert (len(read), read.num_words, read.num_skipped, read.notes) == (2, 3, 0, ())


def test_columns_are_taken_by_number_from_either_end(tmp_path):
    path = write(tmp_path, "1\tAnna\tB-PER\tx\n2\tsleeps\tO\ty\n")
    read = read_conll(path, word_column=1, tag_column=-2)
    assert (read.words, read.tags) == ([["Anna", "sleeps"]], [["B-PER", "O"]])


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path, ending, mark):
    text = ending.join(["Anna\tB-PER", "sleeps\tO", "\t", "Oslo\tB-LOC", "", "", ""])
    read = read_conll(write(tmp_path, mark + text.encode()))
    assert read.words == [["Anna", "sleeps"], ["Oslo"]]
    assert read.tags == [["B-PER", "O"], ["B-LOC"]]


@pytest.mark.parametrize("blank", ["", " ", "\t", " \t "])
def test_a_blank_line_ends_a_sentence_whatever_white_space_it_holds(tmp_path, blank):
    read = read_conll(write(tmp_path, f"Anna B-PER\n{blank}\nOslo B-LOC\n"))
    assert read.words == [["Anna"], ["Oslo"]]


@pytest.mark.parametrize("word", ["\ufe0f", "\u00a0", "\u2028", "\u3000", "\x85", "\x0b", "\u200b", '"'])
@pytest.mark.parametrize("separator", [" ", "\t"])
def test_only_ascii_white_space_parts_words_and_lines(tmp_path, word, separator):
    read = read_conll(write(tmp_path, f"Anna{separator}B-PER\n{word}{separator}O\nsleeps{separator}O\n"))
    assert read.words == [["Anna", word, "sleeps"]]


def test_tabs_part_columns_where_most_lines_hold_one_so_that_words_may_hold_spaces(tmp_path):
    read = read_conll(write(tmp_path, "New York\tB-LOC\nis\tO\nbig\tO\n"))
    assert read.words == [["New York", "is", "big"]]
    assert read_conll(write(tmp_path, "Anna \t B-PER\nis   O\nbig O\n")).tags == [["B-PER", "O", "O"]]


@pytest.mark.parametrize("mark", ["-DOCSTART- -X- -X- O", "-DOCSTART-", "-DOCSTART- O", "-DOCSTART-\tO"])
@pytest.mark.parametrize("blank", ["\n", ""])
def test_document_marks_are_left_out_and_counted(tmp_path, mark, blank):
    text = f"{mark}\n{blank}Anna N N B-PER\n{blank}{mark}\n{blank}Oslo N N B-LOC\n"
    read = read_conll(write(tmp_path, text))
    assert read.words == [["Anna"], ["Oslo"]]
    assert len(read.notes) == 1
    assert "2 -DOCSTART- lines left out" in read.notes[0]


def test_comments_are_left_out_and_a_hash_stays_a_word(tmp_path):
    text = "# id 61ac domain=en\nAnna _ _ B-PER\n# _ _ O\n\n# _ _ O\n#oslo _ _ B-LOC\n\n#\nOlaf _ _ B-PER\n"
    read = read_conll(write(tmp_path, text))
    assert read.words == [["Anna", "#"], ["#", "#oslo"], ["Olaf"]]
    assert "2 comment lines left out" in read.notes[0]


def test_comments_with_tabs_are_left_out(tmp_path):
    text = "#\thttp://example.org [2009-10-17]\n1\tAnna\tB-PER\tO\n2\tsleeps\tO\tO\n"
    read = read_conll(write(tmp_path, text), word_column=1, tag_column=2)
    assert (read.words, read.tags) == ([["Anna", "sleeps"]], [["B-PER", "O"]])


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("sleeps", "has 1 column, most lines 3"),
        ("sleeps VB", "has 2 columns, most lines 3"),
        ("is asleep VB O", "has 4 columns, most lines 3"),
        ("# 1 column 2", "has 4 columns, most lines 3"),
        ("\u3000", "has 1 column, most lines 3"),
    ],
)
def test_a_malformed_line_is_named_and_its_sentence_can_be_left_out(tmp_path, line, fault):
    path = write(tmp_path, f"Olaf NNP B-PER\nis VB O\n\nAnna NNP B-PER\n{line}\nnow RB O\n\nOslo NNP B-LOC\n")
    with pytest.raises(DataError) as caught:
        read_conll(path)
    assert str(caught.value).startswith(f"{path}:5: {fault}")
    assert "dataset.on_bad_row=skip" in str(caught.value)
    read = read_conll(path, on_bad_row="skip")
    assert read.words == [["Olaf", "is"], ["Oslo"]]
    assert read.num_skipped == 1


def test_more_columns_do_not_matter_where_both_are_counted_from_the_front(tmp_path):
    path = write(tmp_path, "Anna B-PER x\nsleeps O\nnow O x y\nand O x\n")
    assert read_conll(path, 0, 1).tags == [["B-PER", "O", "O", "O"]]


@pytest.mark.parametrize(("line", "fault"), [("\tO", "has no word"), ("sleeps\t", "has 1 column, most lines 2")])
def test_an_empty_column_between_tabs_is_named(tmp_path, line, fault):
    path = write(tmp_path, f"Anna\tB-PER\n{line}\nOslo\tB-LOC\n")
    with pytest.raises(DataError, match=f":2: {fault}"):
        read_conll(path)


def test_a_first_line_that_is_malformed_spoils_its_sentence_only(tmp_path):
    read = read_conll(write(tmp_path, "Anna\nsleeps O\n\nOslo B-LOC\nis O\nbig O\n"), on_bad_row="skip")
    assert (read.words, read.num_skipped) == ([["Oslo", "is", "big"]], 1)


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("", (0, -1), "has no sentences"),
        ("-DOCSTART- O\n\n", (0, -1), "has no sentences"),
        ("Anna\nsleeps\n", (0, -1), "have one column only"),
        ("Anna B-PER\n", (0, 3), "dataset.columns.label is 3, but the lines have 2 columns"),
        ("Anna B-PER\n", (-3, -1), "dataset.columns.text is -3"),
        ("Anna x B-PER\n", (2, -1), "are to have words and tags in column 2"),
        (b"Anna B-PER\n\xff O\n", (0, -1), ":2: is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_cause(tmp_path, content, columns, message):
    with pytest.raises(DataError, match=message):
        read_conll(write(tmp_path, content), *columns)


def test_a_file_whose_sentences_are_all_malformed_is_refused(tmp_path):
    path = write(tmp_path, "Anna\tB-PER\nsleeps\n\nOslo\tB-LOC\nthere\n\nis\tO\nit\n\tO\n")
    with pytest.raises(DataError, match="all 3 sentences are malformed"):
        read_conll(path, on_bad_row="skip")


def test_a_missing_file_is_refused_in_words(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_conll(tmp_path / "none.conll")


def test_iob1_files_as_conll_2003_has_them_are_read_whole(tmp_path):
    train = read_conll(iob1_file(tmp_path / "train.conll", 60))
    dev = read_conll(iob1_file(tmp_path / "dev.conll", 20))
    assert (len(train), len(dev)) == (60, 20)
    assert sum("\ufe0f" in words for words in train.words) == 9
    assert "1 -DOCSTART- line left out" in train.notes[0]


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("Anna B-PER\nsleeps O\n", True),
        ("Anna NNP I-NP S-PER\nsleeps VB I-VP O\n", True),
        ("Anna U-PER\nin O\nNew B-LOC\nYork L-LOC\n", True),
        ("-DOCSTART- -X- O\n\nAnna N I-PER\nsleeps V O\n", True),
        ("# sent_id = 1\nAnna\tB-PER\nsleeps\tO\n", True),
        ("sentence\tlabel\na good film\t1\na bad film\t0\n", False),
        ("the film is good\nthe plot is bad\n", False),
        ("Anna NNP\nsleeps VB\n", False),
        ("O\nO\n", False),
        ("", False),
    ],
)
def test_a_conll_file_is_told_by_its_last_column(tmp_path, content, answer):
    assert looks_like_conll(write(tmp_path, content, "some.txt")) is answer


def test_a_missing_file_looks_like_nothing(tmp_path):
    assert not looks_like_conll(tmp_path / "none.txt")


@pytest.mark.skipif(not WNUT17.is_dir(), reason="the shared WNUT-17 files are not there")
@pytest.mark.parametrize(
    ("name", "num_sentences", "num_without_piece"),
    [("wnut17train.conll", 3394, 0), ("emerging.dev.conll", 1009, 4), ("emerging.test.annotated", 1287, 3)],
)
def test_wnut17_is_read_whole(name, num_sentences, num_without_piece):
    read = read_conll(WNUT17 / name)
    assert len(read) == num_sentences
    selectors = [tag for words, tags in zip(read.words, read.tags) for w, tag in zip(words, tags) if w == "\ufe0f"]
    assert selectors == ["O"] * num_without_piece
    assert looks_like_conll(WNUT17 / name)


def test_a_file_whose_suffix_says_conll_is_read_as_such_though_half_of_it_is_damaged(tmp_path):
    """Its lines alone would not tell."""
    path = tmp_path / "train.conll"
    path.write_text("EU B-ORG\nrejects O\n\nPeter B-PER\nBlackburn\n\n")
    assert not looks_like_conll(path)
    (tmp_path / "dev.conll").write_text("EU B-ORG\n")
    with pytest.raises(DataError, match=r"train\.conll:5: .*Blackburn"):
        load_task(DatasetConfig(path=str(tmp_path)))
