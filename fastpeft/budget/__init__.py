"""The budget: what is spent, what is left, and when something is due."""

from fastpeft.budget.clock import BudgetClock, Due

__all__ = ["BudgetClock", "Due"]
