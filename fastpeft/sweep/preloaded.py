"""What a trial imports, once for all of them: in the server that their processes are forked from. It starts no thread
and touches no GPU."""

import datasets  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401

import fastpeft.adapters.iw_lora
import fastpeft.trackers
import fastpeft.trainer.run  # noqa: F401
