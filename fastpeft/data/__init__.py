"""Rows of files and of the hub, and token batches. It knows no kind of task."""
