"""Several runs side by side: figures, means over seeds, and one run on several sets."""
