"""A run's weights as a folder that loads elsewhere: a PEFT adapter, or a merged transformers model."""
