"""Any number of labels for a text, or for a pair of texts."""
