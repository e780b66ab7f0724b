"""Run by an interpreter with gguf: what llama.cpp multiplies an adapter's update by, and its tensors.

python child_gguf.py ADAPTER.gguf OUT.npz
"""

import sys

import numpy as np
from gguf import GGUFReader

reader = GGUFReader(sys.argv[1])
found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
field = reader.fields["adapter.lora.alpha"]
np.savez(sys.argv[2], alpha=np.array(field.parts[field.data[0]][0]), **found)
