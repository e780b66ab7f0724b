"""Search a run's settings: trials by Optuna, and the best of them trained in full."""
