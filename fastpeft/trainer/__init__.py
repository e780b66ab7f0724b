"""Train one run to the end of its budget."""

from fastpeft.trainer.interrupt import StopRequest
from fastpeft.trainer.run import Reporter, train

__all__ = ["Reporter", "StopRequest", "train"]
