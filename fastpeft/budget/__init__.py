"""The budget of a run: its clock, its energy meter, and periodic events."""

from fastpeft.budget.clock import BudgetClock, Due
from fastpeft.budget.energy import EnergyMeter

__all__ = ["BudgetClock", "Due", "EnergyMeter"]
