"""A process that compares answers in LaTeX for `boxed`: a pair [reference, answer] in JSON a line, 1 or 0 back.

math-verify is asked with the reference first, and never the other way round: an interval is an answer to an inequality,
but an inequality that only repeats the question is none to an interval.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_MEMORY_BYTES = 4 * 2**30
"""Of addresses. A tower of powers takes all there is before it takes its time."""


def same(wanted: str, given: str) -> bool:
    """Each is put into a box of its own: two boxes in one text would be read as a set."""
    import math_verify

    # Its own time limits are wall clocks, which a busy machine makes wrong: whoever asks has one of CPU time.
    found: Any = [
        math_verify.parse(
            f"\\boxed{{{text}}}",
            extraction_config=[math_verify.LatexExtractionConfig(boxed_match_priority=0)],
            parsing_timeout=None,  # pyright: ignore[reportArgumentType]
        )
        for text in (wanted, given)
    ]
    return bool(all(found) and math_verify.verify(*found, timeout_seconds=None))


def main() -> None:
    import logging
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    same("1", "2")  # loads the library and builds its parser, before the first pair's time begins
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = same(*json.loads(line))
        except Exception:  # what the library cannot read is no answer
            answer = False
        print(int(answer), flush=True)


if __name__ == "__main__":
    main()
