"""Run folders: the event log, result.json, listing. Imports no torch."""
