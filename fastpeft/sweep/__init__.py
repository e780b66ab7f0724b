"""Hyperparameter search by Optuna, followed by a full training of the best settings."""
