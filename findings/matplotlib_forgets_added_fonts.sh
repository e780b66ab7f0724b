#!/usr/bin/env bash
# matplotlib forgets all added fonts once the file of one of them is gone.
#
# Versions: matplotlib 3.11.2, fonttools 4.68.0; Python 3.11.
# fontManager.addfont keeps a path. If findfont finds an entry whose file has been removed, it rebuilds the list of fonts
# from the system's folders. Fonts added by addfont are not in these folders, so that all of them are lost, including
# those whose files still exist. No error is raised: texts are drawn in DejaVu Sans, and the logger has a line
# "findfont: Font family ... not found" for each of them.
# A program that makes a font in a temporary folder for each figure or report is affected: the second figure of a process
# is drawn in another font.
# Seen:
#   both files there          Second
#   the first file removed    DejaVu Sans, though the second font's file is there
# Guard: keep the file of an added font until the process ends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet matplotlib==3.11.2 fonttools==4.68.0
cat > "$folder/try.py" <<'PYTHON'
import sys
from pathlib import Path

from fontTools.ttLib import TTFont
from matplotlib.font_manager import FontProperties, findfont, fontManager


def make(name: str) -> Path:
    """DejaVu Sans under another name, added to matplotlib's fonts."""
    font = TTFont(findfont("DejaVu Sans"))
    for record in font["name"].names:
        if record.nameID in (1, 3, 4, 6, 16):
            record.string = name
    path = Path(sys.argv[1]) / f"{name}.ttf"
    font.save(path)
    fontManager.addfont(path)
    return path


def drawn_in(family: str, size: int = 10) -> str:
    return Path(str(findfont(FontProperties(family=family, size=size)))).stem


first, second = make("First"), make("Second")
there = drawn_in("First"), drawn_in("Second")
print("both files there:", *there)
assert there == ("First", "Second")
first.unlink()
drawn_in("First", size=11)  # a size that was asked for before is remembered
after = drawn_in("Second", size=11)
print("the first file removed:", after, "although", second.name, "is there:", second.exists())
assert (after, second.exists()) == ("DejaVuSans", True)
PYTHON
MPLCONFIGDIR="$folder/config" "$folder/venv/bin/python" "$folder/try.py" "$folder"
echo "as described"
