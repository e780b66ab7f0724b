"""Learning-rate schedules; config/schedules.py lists them."""

from fastpeft.schedules.schedule import Schedule, make_schedule

__all__ = ["Schedule", "make_schedule"]
