"""Learning-rate schedules. Importing a module here registers its schedules."""

from fastpeft.schedules import bacon, bats, classic, fot, graff, reactor, salelr, snac
from fastpeft.schedules.schedule import Schedule, make_schedule

__all__ = ["Schedule", "bacon", "bats", "classic", "fot", "graff", "make_schedule", "reactor", "salelr", "snac"]
