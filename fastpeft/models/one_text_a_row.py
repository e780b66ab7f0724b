"""Skips transformers' check, in each forward pass of a decoder, whether rows hold several packed texts.

The check reads the positions. If transformers made them itself, each row holds one text. The check synchronizes with
the device, and cannot run in a captured step: transformers then builds a mask although torch's attention needs none.
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
    """Context, for this thread, without the check. For decoders called without positions."""
    _watch()
    _here.known = True
    try:
        yield
    finally:
        _here.known = False


def _watch() -> None:
    """Wrap the check. A transformers version with another check is unchanged and synchronizes."""
    from transformers import masking_utils

    asks: Any = getattr(masking_utils, _ASKS, None)
    if asks is None or getattr(asks, "by_fastpeft", False):
        return

    def asks_where_unknown(position_ids: Any, *rest: Any, **more: Any) -> Any:
        return None if getattr(_here, "known", False) else asks(position_ids, *rest, **more)

    asks_where_unknown.by_fastpeft = True  # type: ignore[attr-defined]
    setattr(masking_utils, _ASKS, asks_where_unknown)
