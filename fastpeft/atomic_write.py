"""Files that a reader, or a resume after a kill, finds whole."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 so that a reader sees the old file or the new one, never a part, whenever the process is killed.

    Raises:
        OSError: there is no room, or no permission; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
