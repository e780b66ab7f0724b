"""The Optuna study of a sweep: storage, sampler, pruner, check of its settings, and the trials that count."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from fastpeft.config.search import OptunaConfig
from fastpeft.errors import UserError, first_line
from fastpeft.sweep.journal import open_journal
from fastpeft.sweep.space import differences

IDENTITY = "fastpeft"
"""User attribute of a study: the settings that its trials share, see space.identity."""
JOURNAL = "journal.log"
OPENINGS, OPENED_AGAIN_S = 6, 0.5
"""Attempts, and seconds between them, to open a storage whose tables another host is creating."""


class StudyError(UserError):
    """A study that cannot be used; the message says what to do."""


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """A journal in `folder`, or the storage of an Optuna URL.

    Raises:
        UserError: the storage cannot be opened.
    """
    if url is None:
        return open_journal(folder / JOURNAL)
    for left in reversed(range(OPENINGS)):
        try:
            # Reconnects if the server closed the connection during a trial.
            return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except ImportError as error:
            raise StudyError(f"--storage {_masked(url)}: its driver is missing: {first_line(error)}") from None
        except Exception as error:  # SQLAlchemy and each driver have classes of their own
            if not left or not _is_being_made(error):
                raise StudyError(f"--storage {_masked(url)}: cannot be opened: {first_line(error)}") from None
        time.sleep(OPENED_AGAIN_S)
    raise AssertionError("the last opening returns or raises")


def _is_being_made(error: Exception) -> bool:
    """Whether another host created the tables meanwhile. Hosts that start together all try to; only one succeeds."""
    from sqlalchemy.exc import IntegrityError

    return isinstance(error, IntegrityError) or "already exists" in str(error)


def _masked(url: str) -> str:
    """The URL without its password."""
    scheme, separator, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{login.partition(':')[0]}{at}{place}" if separator else url


def open_study(
    storage: BaseStorage, name: str, config: OptunaConfig, identity: Mapping[str, Any]
) -> tuple[Study, bool]:
    """Open the study `name`, or create it.

    Returns:
        The study, and whether it is new.

    Raises:
        StudyError: the study exists with another space, run, metric or direction.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parts = {"sampler": make_sampler(config, 0), "pruner": make_pruner(config)}
    names = optuna.get_all_study_names(storage)
    is_new = name not in names
    study = optuna.create_study(
        storage=storage, study_name=name, direction=config.direction, load_if_exists=True, **parts
    )
    mine = json.loads(json.dumps(identity))
    theirs = study.user_attrs.get(IDENTITY)
    if theirs is None and not study.trials:
        study.set_user_attr(IDENTITY, mine)
        theirs = mine
    if theirs is None:
        raise StudyError(f"the study {name!r} is there and was not made by a sweep; choose another --name")
    changed = differences(theirs, mine)
    if study.direction.name.lower() != config.direction:
        changed.insert(0, f"optuna.direction: {study.direction.name.lower()} there, {config.direction} here")
    if changed:
        raise StudyError(
            f"the sweep {name!r} is there with other settings, and its trials cannot be compared with new ones:\n  "
            + "\n  ".join(changed)
            + "\n  Set them back to go on with it, or choose another --name"
        )
    return study, is_new


def make_sampler(config: OptunaConfig, number: int) -> BaseSampler:
    """The sampler of trial `number`. The number is part of the seed, so that a continued sweep draws the same values as
    an uninterrupted one."""
    import numpy as np

    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    if config.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(
        n_startup_trials=config.startup_trials,
        n_ei_candidates=24,
        seed=seed,
        multivariate=True,  # one joint density: the best learning rate depends on the batch size
        group=False,  # every trial has every key
        constant_liar=True,  # concurrent trials avoid the same region
    )


def make_pruner(config: OptunaConfig) -> BasePruner:
    if config.pruner == "none":
        return NopPruner()
    if config.pruner == "halving":
        return SuccessiveHalvingPruner(
            min_resource=max(1, config.pruner_warmup), reduction_factor=2, min_early_stopping_rate=0, bootstrap_count=0
        )
    return MedianPruner(
        n_startup_trials=config.pruner_startup,
        n_warmup_steps=config.pruner_warmup + 1,  # evaluations count from 1
        interval_steps=1,
        n_min_trials=3,
    )


def ask(study: Study, config: OptunaConfig, space: dict[str, BaseDistribution]) -> optuna.Trial:
    """A new trial with a value for every key."""
    study.sampler = make_sampler(config, len(study.get_trials(deepcopy=False)))
    return study.ask(fixed_distributions=space)


def counted(study: Study) -> list[FrozenTrial]:
    """Complete and pruned trials, which count towards optuna.trials."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def best_of(study: Study) -> FrozenTrial | None:
    """The best complete trial with a finite value that satisfies the constraints; None if there is none.

    Optuna's own best_trial accepts -inf in a minimisation, and raises if all trials were pruned.
    """
    trials = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.value is not None and math.isfinite(trial.value) and is_feasible(trial)
    ]
    sign = -1.0 if study.direction == optuna.study.StudyDirection.MINIMIZE else 1.0
    return max(trials, key=lambda trial: (sign * (trial.value or 0.0), -trial.number), default=None)


def is_feasible(trial: FrozenTrial) -> bool:
    return all(value <= 0 for value in trial.constraints.values())
