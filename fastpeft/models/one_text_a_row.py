"""transformers asks the device in each pass of a decoder whether its rows hold several texts: positions tell.

Where it made the positions itself they hold one each. The question costs a wait for the device, and a captured pass
cannot ask it: transformers then builds a mask where torch's attention needs none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_here = threading.local()
_ASKS = "find_packed_sequence_indices"


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """Within, in this thread, nothing is asked. For decoders that are given no positions."""
    _watch()
    _here.known = True
    try:
        yield
    finally:
        _here.known = False


def _watch() -> None:
    """A transformers that asks otherwise is left alone: it waits."""
    from transformers import masking_utils

    asks: Any = getattr(masking_utils, _ASKS, None)
    if asks is None or getattr(asks, "by_fastpeft", False):
        return

    def asks_where_unknown(position_ids: Any, *rest: Any, **more: Any) -> Any:
        return None if getattr(_here, "known", False) else asks(position_ids, *rest, **more)

    asks_where_unknown.by_fastpeft = True  # type: ignore[attr-defined]
    setattr(masking_utils, _ASKS, asks_where_unknown)
