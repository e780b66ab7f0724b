"""A process that compares answers in LaTeX for `boxed`: a pair [reference, answer] in JSON a line, 1 or 0 back.

math-verify is asked with the reference first, and never the other way round: an interval is an answer to an inequality,
but an inequality that only repeats the question is none to an interval.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_LIMIT_S = 3
"""Of each of the library's own alarms: this is a main thread."""


def same(wanted: str, given: str) -> bool:
    """Each is put into a box of its own: two boxes in one text would be read as a set."""
    import math_verify

    found: Any = [
        math_verify.parse(
            f"\\boxed{{{text}}}",
            extraction_config=[math_verify.LatexExtractionConfig(boxed_match_priority=0)],
            parsing_timeout=_LIMIT_S,
        )
        for text in (wanted, given)
    ]
    return bool(all(found) and math_verify.verify(*found, timeout_seconds=_LIMIT_S))


def main() -> None:
    import logging

    import math_verify  # noqa: F401 (what takes a second is done before the first pair)

    logging.disable(logging.CRITICAL)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = same(*json.loads(line))
        except Exception:  # what the library cannot read is no answer
            answer = False
        print(int(answer), flush=True)


if __name__ == "__main__":
    main()
