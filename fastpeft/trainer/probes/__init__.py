"""Measurements of a step that a schedule asks for, beyond the loss and its gradient."""
