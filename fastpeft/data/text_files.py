"""The text of a file: unpacked, decoded by its byte order mark, else as UTF-8. Nothing is decoded by a guess."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from fastpeft.data.rows import DataError

PACKED = ".gz"
_POINTER = b"version https://git-lfs"

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BLOCK_BYTES = 2**20
_SMALL_BYTES = 2**28
"""An unpacked file up to which nobody asks what memory there is: torch is loaded for that."""
_LINE_END = re.compile(r"\r\n|\r|\n")
_CONVERT = "Save it as UTF-8, or convert it: iconv -f {encoding} -t UTF-8"


def format_of(path: Path) -> str:
    """The suffix that names the format, in small letters: `.csv` of Train.CSV and of train.csv.gz."""
    return _unpacked(path).suffix.lower()


def stem_of(path: Path) -> str:
    """The name without that suffix."""
    return _unpacked(path).stem


def open_bytes(path: Path) -> BinaryIO:
    """For reading, unpacked."""
    return cast(BinaryIO, gzip.open(path)) if _is_packed(path) else path.open("rb")


def read_bytes(path: Path) -> bytes:
    """All of a file, unpacked. Raises DataError for one that cannot be read."""
    try:
        content = _unpack(path) if _is_packed(path) else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is no whole gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if content.startswith(_POINTER):
        raise DataError(f"{path}: is a pointer of Git LFS and no data: run `git lfs pull` in its repository")
    return content


def _unpack(path: Path) -> bytes:
    """Refuses, before memory runs out, what unpacks to more than half of what is free: 1 MB of gzip can hold 1 GB."""
    content, largest = bytearray(), None
    with gzip.open(path) as file:
        while block := file.read(_BLOCK_BYTES):
            content += block
            if len(content) > _SMALL_BYTES:
                largest = _half_of_free() if largest is None else largest
                if len(content) > largest:
                    raise DataError(
                        f"{path}: unpacks to more than {largest / 2**30:.1f} GB, half of the memory that is free. "
                        "Unpack it and see what is in it, or split it into several files"
                    )
    return bytes(content)


def _half_of_free() -> int:
    import torch

    from fastpeft.device_memory import free_bytes

    return free_bytes(torch.device("cpu")) // 2


def read_text(path: Path) -> tuple[str, tuple[str, ...]]:
    """(the text, what the user should know of it). Lines end in a line feed, or in a carriage return and a line feed.

    Raises:
        DataError: a file that cannot be read, or with bytes that its encoding does not have; the message has the line.
    """
    content = read_bytes(path)
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and 4 * content.count(b"\0") > len(content):
        convert = _CONVERT.format(encoding="UTF-16LE")
        raise DataError(f"{path}: is full of NUL bytes, as UTF-16 without a byte order mark is. {convert}")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(_not_text(path, content, encoding, error)) from None
    notes = () if encoding.startswith("utf-8") else (f"{path}: is {encoding.upper()} text",)
    if "\r" in text and _ends_in_returns(text):
        text = text.replace("\r", "\n")
        notes += (f"{path}: its lines end in carriage returns",)
    return text, notes


def _ends_in_returns(text: str) -> bool:
    """Whether a carriage return alone ends the first line, and many others: a line feed may stand inside a field."""
    returns, feeds = text.count("\r") - text.count("\r\n"), text.count("\n")
    first = _LINE_END.search(text)
    return first is not None and first[0] == "\r" and 2 * returns > feeds


def _not_text(path: Path, content: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    if encoding not in ("utf-8", "utf-8-sig"):
        return f"{path}: begins with the mark of {encoding.upper()}, but is no such text ({error.reason})"
    line = content[: error.start].count(b"\n") + 1
    convert = _CONVERT.format(encoding="WINDOWS-1252")
    return f"{path}:{line}: is not UTF-8 text: it has the byte {content[error.start]:#x}. {convert}, if it is that"


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == PACKED


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if _is_packed(path) else path
