"""Learning-rate schedules. Importing a module here registers its schedules."""

from fastpeft.schedules import classic, fot, graff
from fastpeft.schedules.base import Schedule, make_schedule

__all__ = ["Schedule", "classic", "fot", "graff", "make_schedule"]
