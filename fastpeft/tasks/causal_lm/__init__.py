"""What every language-model task with a masked prompt shares: batches, loss, head and decoding."""
