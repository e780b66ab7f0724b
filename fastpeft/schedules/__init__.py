"""Learning-rate schedules. Importing a module here registers its schedules."""

from fastpeft.schedules import classic, fot
from fastpeft.schedules.base import Schedule, make_schedule

__all__ = ["Schedule", "classic", "fot", "make_schedule"]
