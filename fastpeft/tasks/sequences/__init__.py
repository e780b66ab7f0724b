"""What tasks share whose rows are a text, or a pair of texts, with one answer: reading, tokens, batches, scoring."""
