"""What a set-up tells about the kernels that a run will meet."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastpeft.errors import UserError
from fastpeft.kernels import dispatch
from fastpeft.kernels.dispatch import Choice
from fastpeft.trainer.build import untuned

GPU = torch.device("cuda", 0)
ADAPTER = SimpleNamespace(
    flat=SimpleNamespace(
        groups=[
            SimpleNamespace(a_KRI=torch.zeros(2, 8, num_in), b_KOR=torch.zeros(2, num_out, 8))
            for num_in, num_out in ((24, 24), (24, 48))
        ]
    )
)


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Write the table of the GPU that is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "gpu_name", lambda index: "Test GPU")
    dispatch.table.cache_clear()

    def table(*shapes, dtype=torch.bfloat16):
        keys = [dispatch.key_of("lora_forward", dtype, *shape, 100) for shape in shapes]
        dispatch.write_table(dispatch.table_path("Test GPU"), dict.fromkeys(keys, Choice("split")), {})

    yield table
    dispatch.table.cache_clear()


def test_a_gpu_without_a_table_is_noted_once(write):
    (note,) = untuned(ADAPTER, GPU, torch.bfloat16)
    assert note.startswith("kernels are not tuned for this GPU")
    assert "fastpeft doctor --tune" in note


@pytest.mark.parametrize(
    ("shapes", "dtype", "noted"),
    [
        ([(24, 24, 8), (24, 48, 8)], torch.bfloat16, False),
        ([(24, 24, 8)], torch.bfloat16, True),
        ([(24, 24, 8), (24, 48, 4)], torch.bfloat16, True),
        ([(24, 24, 8), (24, 48, 8)], torch.float16, True),
    ],
)
def test_the_note_is_about_the_shapes_of_the_run(write, shapes, dtype, noted):
    write(*shapes, dtype=dtype)
    assert len(untuned(ADAPTER, GPU, torch.bfloat16)) == noted


def test_nothing_is_noted_on_a_cpu_or_without_lora(write):
    assert untuned(ADAPTER, torch.device("cpu"), torch.float32) == []
    assert untuned(SimpleNamespace(flat=SimpleNamespace(groups=[])), GPU, torch.bfloat16) == []


def test_a_damaged_table_is_told_before_the_run(write):
    write((24, 24, 8))
    dispatch.table_path("Test GPU").write_text("{")
    dispatch.table.cache_clear()
    with pytest.raises(UserError, match="is no table of kernel choices"):
        untuned(ADAPTER, GPU, torch.bfloat16)
