"""One folder an operation: reference.py says what it computes, kernel.py computes it in Triton, op.py chooses."""
