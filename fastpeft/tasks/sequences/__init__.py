"""Shared code of tasks whose rows are one text or a pair, with one label: reading, tokens, batches, scoring."""
