"""Small pretrained encoders that ship with the package, for when no hub can be reached."""

from pathlib import Path

PATHS = {"deberta_tiny": Path(__file__).parent / "deberta_tiny"}
