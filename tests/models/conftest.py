"""One saved model of each family for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import CAUSAL_FAMILIES, FAMILIES, make_causal_lm, make_model


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_model(tmp_path_factory.mktemp("models") / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def causal_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_causal_lm(tmp_path_factory.mktemp("causal") / family, family) for family in CAUSAL_FAMILIES}
