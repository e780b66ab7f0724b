"""The family of tasks: what the rows of a dataset are."""

from __future__ import annotations

from fastpeft.config.registry import Entry, Registry

TASKS: Registry[Entry] = Registry(
    "task",
    "dataset.task",
    [
        Entry(name="classification", target="fastpeft.tasks.sequence_classification.task:SequenceClassification"),
        Entry(name="token-classification", target="fastpeft.tasks.token_classification.task:TokenClassification"),
        Entry(name="multi-label", target="fastpeft.tasks.multi_label.task:MultiLabel"),
        Entry(name="regression", target="fastpeft.tasks.regression.task:Regression"),
        Entry(name="word-problems", target="fastpeft.tasks.math_word_problems.task:MathWordProblems"),
        Entry(name="chat", target="fastpeft.tasks.chat.task:Chat"),
    ],
)
