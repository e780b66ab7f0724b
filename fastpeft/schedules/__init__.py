"""Learning-rate schedules. Importing a module here registers its schedules."""

from fastpeft.schedules import classic
from fastpeft.schedules.base import Schedule, make_schedule

__all__ = ["Schedule", "classic", "make_schedule"]
