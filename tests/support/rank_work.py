"""What tests have ranks do: `on_ranks` imports it in each of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any


def trained(
    files: Path, kind: str, name: str, sections: dict[str, Any], resume: bool = False, stop_at: int | None = None
) -> dict[str, Any]:
    """The result of a run of `kind` in `files`.

    Args:
        stop_at: rank 0 is asked to stop as it logs this step.
    """
    import signal

    from fastpeft.trainer import StopRequest, train
    from tests.support.every_kind import run_of_kind
    from tests.support.tiny_runs import Listener

    stop = StopRequest()

    def on(event: dict[str, Any]) -> None:
        if event["type"] == "step" and event["step"] == stop_at:
            stop.signal = signal.SIGTERM

    run = run_of_kind(files, kind, **sections)
    found = train(run, results_dir=files, name=name, reporter=Listener(on), stop=stop, resume=resume)
    return asdict(found)


def built(files: Path, kind: str, sections: dict[str, Any]) -> Any:
    """The job of a run of `kind`, on all ranks."""
    from fastpeft.ranks import join
    from fastpeft.trainer.build import build_job
    from fastpeft.trainer.follower import begin_together
    from fastpeft.trainer.interrupt import StopRequest
    from fastpeft.trainer.rank_orders import Orders
    from tests.support.every_kind import run_of_kind

    job = build_job(run_of_kind(files, kind, **sections), orders=Orders(join(), StopRequest()))
    begin_together(job)
    return job
