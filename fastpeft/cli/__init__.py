"""The command line. Importing it loads no torch."""

from fastpeft.cli.commands import main

__all__ = ["main"]
