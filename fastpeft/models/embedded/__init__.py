"""Small pretrained models that ship with the package, for when no hub can be reached."""

from pathlib import Path

PATHS = {name: Path(__file__).parent / name for name in ("deberta_tiny", "qwen3_tiny")}
