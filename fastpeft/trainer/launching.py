"""Several ranks of one run on this host, started by torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

STOP_S = 600
"""Seconds for ranks to end their step and save after a stop request. TORCH_ELASTIC_SHUTDOWN_TIMEOUT overrides it."""


def launch(arguments: Sequence[str], num_ranks: int, max_restarts: int, name: str) -> int:
    """Run `fastpeft ARGUMENTS` in `num_ranks` processes, until all have ended. A signal is passed on to them.

    Args:
        max_restarts: how often all ranks are restarted after one has failed.
        name: the run's name.

    Returns:
        The exit code of the rank that failed first; 0 if none has.
    """
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    logging.disable(logging.CRITICAL)  # the launcher repeats what a rank has reported
    with tempfile.TemporaryDirectory(prefix="fastpeft-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOP_S)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "fastpeft", *arguments)
        except ChildFailedError as error:
            return _code(error)
        except SignalException as error:
            return 128 + error.sigval
        except KeyboardInterrupt:  # there is no rank yet
            return 128 + signal.SIGINT
    return 0


def _code(error: ChildFailedError) -> int:
    """The exit code to report. A rank that ended by itself tells more than one that was killed because of it."""
    codes = [failure.exitcode for failure in error.failures.values()]
    said = [code for code in codes if code > 0]
    if said:
        return said[0]
    print(f"fastpeft: every rank was killed (signal {-codes[0]}); resume the run with --resume", file=sys.stderr)
    return 128 - codes[0]
