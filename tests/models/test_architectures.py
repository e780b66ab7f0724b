"""Every architecture of transformers that builds from a tiny config: right, slower, or refused with a cause."""

from __future__ import annotations

import pytest

from tests.support.architectures import names, sweep

FEWEST = {"causal": 120, "classifier": 85}
"""Architectures that have to be right, whatever else transformers has."""


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", FEWEST)
def test_no_architecture_is_wrong_in_silence(kind: str) -> None:
    rows = list(sweep(kind, names(kind)))
    for row in rows:
        print(f"{row.name}: {row.status} {row.why}")
    assert not [row for row in rows if row.status == "WRONG"]
    assert sum(row.status in ("right", "slower") for row in rows) >= FEWEST[kind]
    assert all(row.why for row in rows if row.status in ("slower", "refused"))


@pytest.mark.parametrize(
    ("kind", "name", "status"),
    [("causal", "mamba", "slower"), ("causal", "lfm2", "right"), ("causal", "rembert", "refused"),
     ("causal", "llama4_text", "right"), ("causal", "gptj", "right"),
     ("classifier", "mpnet", "right"), ("classifier", "fnet", "slower"),
     ("classifier", "gpt2", "right")],
)  # fmt: skip
def test_some_of_them_each_time(kind: str, name: str, status: str) -> None:
    (row,) = sweep(kind, [name])
    assert row.status == status, row
