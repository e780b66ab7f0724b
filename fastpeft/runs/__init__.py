"""Run folders: the event log, result.json, listing. No torch in here."""
