"""The command line. Importing it loads no torch."""

from fastpeft.cli.app import main

__all__ = ["main"]
