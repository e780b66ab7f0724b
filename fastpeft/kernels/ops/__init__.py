"""One folder per operation: reference.py is the specification, kernel.py the Triton kernel, op.py the public function
that chooses between Triton and PyTorch."""
