"""Run by an interpreter with mlx-lm: loads models, with their adapters, and saves their logits.

python child_mlx.py JOBS.json OUT.npz       as child_transformers.py
"""

import json
import sys

import mlx.core as mx
import numpy as np
from mlx_lm import load

mx.set_default_device(mx.cpu)


def logits(job):
    model, _ = load(job["model"], adapter_path=job["adapter"])
    return np.array(model(mx.array(job["ids"])).astype(mx.float32))


found = {}
with open(sys.argv[1]) as file:
    jobs = json.load(file)
for i, job in enumerate(jobs):
    try:
        found[str(i)] = logits(job)
    except Exception as error:
        found[str(i)] = np.array([f"{type(error).__name__}: {error}"])
np.savez(sys.argv[2], **found)
