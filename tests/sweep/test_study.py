"""What a study is of, which trials count in it, and whose a running one is."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from fastpeft.config.search import OptunaConfig
from fastpeft.errors import UserError
from fastpeft.sweep import lease
from fastpeft.sweep import study as study_module
from fastpeft.sweep.lease import DEAD_AFTER_S, HEARTBEAT, LEASE, Lease, is_alive
from fastpeft.sweep.space import identity
from fastpeft.sweep.study import StudyError, best_of, counted, make_pruner, make_sampler, open_storage, open_study
from fastpeft.sweep.sweep_figures import draw_sweep, importances
from tests.support.toy_trials import SPACE, toy_run


def opened(folder: Path, **optuna_section):
    run = toy_run(**optuna_section)
    return open_study(open_storage(None, folder), "s", run.optuna, identity(run))


# ---- another sweep -------------------------------------------------------------------------


def test_the_same_is_found_again_and_another_space_is_refused_with_what_differs(tmp_path):
    study, is_new = opened(tmp_path)
    study.ask()
    again, is_new_again = opened(tmp_path, trials=90)
    assert (is_new, is_new_again) == (True, False)
    assert len(again.trials) == 1
    narrower = SPACE | {"training.learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-1}}
    with pytest.raises(UserError) as caught:
        opened(tmp_path, space=narrower)
    message = str(caught.value)
    assert "optuna.space.training.learning_rate: {'type': 'loguniform', 'low': 1e-05, 'high': 0.1} there" in message
    assert "choose another --name" in message
    assert "batch_size" not in message
    with pytest.raises(UserError, match=r"optuna\.space\.training\.batch_size: .*128.* there, .*64"):
        opened(tmp_path, space=SPACE | {"training.batch_size": {"type": "categorical", "choices": [8, 32, 64]}})
    with pytest.raises(UserError, match=r"optuna\.direction: maximize there, minimize here"):
        opened(tmp_path, direction="minimize")
    with pytest.raises(UserError, match=r"optuna\.pruner: median there, none here"):
        opened(tmp_path, pruner="none")


def test_a_study_of_somebody_elses_is_refused(tmp_path):
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s", direction="maximize")
    study.ask()
    with pytest.raises(UserError, match=r"was not made by a sweep"):
        opened(tmp_path)


def test_hosts_that_start_together_all_open_the_storage(tmp_path):
    """Each would make the tables; a barrier has them begin at once."""
    from multiprocessing import get_context

    context = get_context("spawn")
    barrier, url = context.Barrier(4), f"sqlite:///{tmp_path / 'shared.db'}"
    hosts = [context.Process(target=open_together, args=(barrier, url, tmp_path)) for _ in range(4)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(120)
    assert [host.exitcode for host in hosts] == [0] * 4


def open_together(barrier, url, folder):
    barrier.wait(60)
    open_storage(url, folder)


def test_another_error_than_tables_that_are_there_is_not_tried_again(tmp_path, monkeypatch):
    opened = []

    def refuse(url, **options):
        opened.append(url)
        raise RuntimeError("no such server")

    monkeypatch.setattr(study_module.optuna.storages, "RDBStorage", refuse)
    with pytest.raises(StudyError, match="cannot be opened: no such server"):
        open_storage("postgresql://a", tmp_path)
    assert len(opened) == 1


@pytest.mark.parametrize(
    "url", ["nonsense", "postgresql+psycopg://me:secret@127.0.0.1:1/db", "nosuch://me:secret@h/db"]
)
def test_a_storage_that_cannot_be_opened_is_said_without_its_password(url, tmp_path):
    with pytest.raises(UserError, match=r"--storage") as caught:
        open_storage(url, tmp_path)
    assert "secret" not in str(caught.value)


def test_any_url_of_optuna_is_a_storage(tmp_path):
    run = toy_run()
    study, is_new = open_study(open_storage(f"sqlite:///{tmp_path}/a.db", tmp_path), "s", run.optuna, identity(run))
    study.ask()
    again, is_new_again = open_study(
        open_storage(f"sqlite:///{tmp_path}/a.db", tmp_path), "s", run.optuna, identity(run)
    )
    assert (is_new, is_new_again, len(again.trials)) == (True, False, 1)


# ---- what counts ---------------------------------------------------------------------------


def test_minus_infinity_nan_and_what_was_pruned_are_not_the_best(tmp_path):
    """Of a minimisation -inf is Optuna's own best, and without a complete trial it raises."""
    study, _ = opened(tmp_path, direction="minimize")
    assert best_of(study) is None
    study.tell(study.ask(), state=TrialState.PRUNED)
    assert best_of(study) is None
    study.tell(study.ask(), -math.inf)
    assert study.best_value == -math.inf
    assert best_of(study) is None
    study.tell(study.ask(), 2.0)
    study.tell(study.ask(), 1.0)
    study.tell(study.ask(), 1.0)
    expensive = study.ask()
    expensive.set_constraint("energy_j", 1.0)
    study.tell(expensive, 0.0)
    found = best_of(study)
    assert found is not None
    assert (found.value, found.number) == (1.0, 3)  # the first of equal ones
    study.ask()
    study.tell(study.ask(), state=TrialState.FAIL)
    assert len(counted(study)) == 6


def test_each_trials_sampler_has_a_seed_of_its_own_and_the_sweeps():
    def draw(seed: int, number: int) -> float:
        study = optuna.create_study(sampler=make_sampler(OptunaConfig(seed=seed), number))
        return study.ask({"x": FloatDistribution(0, 1)}).params["x"]

    drawn = [draw(seed, number) for seed in (0, 1) for number in range(20)]
    assert len(set(drawn)) == 40
    assert drawn == [draw(seed, number) for seed in (0, 1) for number in range(20)]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("pruner", ["median", "halving", "none"])
def test_every_choice_builds(sampler, pruner):
    config = OptunaConfig(sampler=sampler, pruner=pruner)
    make_sampler(config, 0)
    make_pruner(config)


def test_no_trial_is_pruned_before_enough_are_complete(tmp_path):
    study, _ = opened(tmp_path, pruner_startup=3, pruner_warmup=1)
    for value in (0.5, 0.6, 0.7):
        trial = study.ask()
        for evaluation in (1, 2, 3):
            trial.report(value, evaluation)
            assert not trial.should_prune()
        study.tell(trial, value)
    trial = study.ask()
    trial.report(0.1, 1)
    assert not trial.should_prune()  # warm-up
    trial.report(0.1, 2)
    assert trial.should_prune()


# ---- leases --------------------------------------------------------------------------------


def test_a_lease_is_alive_with_its_process():
    mine = Lease.mine()
    assert is_alive({LEASE: mine.to_json()})
    assert not is_alive({})
    assert not is_alive({LEASE: "rubbish"})
    assert not is_alive({LEASE: dataclasses.replace(mine, pid=2**22 + 1).to_json()})
    # the number of a process that began at another time: it was given again
    assert not is_alive({LEASE: dataclasses.replace(mine, started_s=mine.started_s - 60).to_json()})


def test_a_process_that_has_ended_and_was_not_waited_for_is_dead(monkeypatch):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    import psutil

    try:
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        theirs = dataclasses.replace(Lease.mine(), pid=pid, started_s=psutil.Process(pid).create_time())
        assert not is_alive({LEASE: theirs.to_json()})
    finally:
        os.waitpid(pid, 0)


def test_from_another_machine_the_heartbeat_decides(monkeypatch):
    elsewhere = dataclasses.replace(Lease.mine(), host="elsewhere").to_json()
    now_s = 1e9
    assert is_alive({LEASE: elsewhere, HEARTBEAT: now_s - DEAD_AFTER_S / 2}, now_s)
    assert not is_alive({LEASE: elsewhere, HEARTBEAT: now_s - DEAD_AFTER_S - 1}, now_s)
    assert not is_alive({LEASE: elsewhere}, now_s)
    assert lease.HEARTBEAT_EVERY_S < DEAD_AFTER_S / 3


# ---- figures -------------------------------------------------------------------------------


def test_figures_are_drawn_once_there_is_something_to_draw(tmp_path):
    study, _ = opened(tmp_path)
    space = {"a": FloatDistribution(0, 1), "b": FloatDistribution(0, 1)}
    for i in range(12):
        params = {"a": i / 12, "b": (i * 5 % 12) / 12}
        study.add_trial(create_trial(params=params, distributions=space, value=1 - abs(params["a"] - 0.5)))
        if i == 2:
            draw_sweep(study, tmp_path / "few", "accuracy", stand_in=False)
    study.add_trial(create_trial(state=TrialState.PRUNED, value=0.2, params={"a": 0.1, "b": 0.2}, distributions=space))
    assert sorted(path.name for path in (tmp_path / "few").iterdir()) == ["history.pdf", "history.png"]
    weights = importances(study)
    assert list(weights) == ["a", "b"]
    assert weights["a"] > 0.7
    draw_sweep(study, tmp_path / "all", "accuracy", stand_in=True)
    for name in ("history", "importance"):
        assert (tmp_path / "all" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        pdf = (tmp_path / "all" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/FontFile2" in pdf  # embedded as TrueType, not as outlines
        assert b"/Type3" not in pdf


def test_importances_of_equal_values_are_none(tmp_path):
    study, _ = opened(tmp_path)
    for i in range(6):
        study.add_trial(create_trial(params={"a": i / 6}, distributions={"a": FloatDistribution(0, 1)}, value=0.5))
    assert importances(study) == {}
