"""The budget: what is spent, what is left, and when something is due."""

from fastpeft.budget.clock import BudgetClock, Due
from fastpeft.budget.energy import EnergyMeter

__all__ = ["BudgetClock", "Due", "EnergyMeter"]
