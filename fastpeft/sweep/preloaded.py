"""Imports shared by all trials, loaded once in the server that their processes are forked from. They start no
thread and do not initialise a GPU."""

import datasets  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401

import fastpeft.adapters.iw_lora
import fastpeft.trackers
import fastpeft.trainer.run  # noqa: F401
