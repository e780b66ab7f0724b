"""Run by an interpreter with another transformers: loads models, with their adapters, and saves their logits.

    python child_transformers.py JOBS.json OUT.npz

JOBS.json: [{"model": folder, "adapter": folder or null, "auto": "AutoModelForCausalLM", "ids": [[1, 2]]}]. What fails
is saved as an array of one string.
"""

import json
import sys

import numpy as np
import torch
import transformers


def logits(job):
    auto = getattr(transformers, job["auto"])
    model = auto.from_pretrained(job["model"], dtype=torch.float32)
    if job["adapter"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, job["adapter"])
    if job.get("text"):
        transformers.AutoTokenizer.from_pretrained(job["adapter"] or job["model"])(job["text"])
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(job["ids"])).logits.float().numpy()


found = {}
with open(sys.argv[1]) as file:
    jobs = json.load(file)
for i, job in enumerate(jobs):
    try:
        found[str(i)] = logits(job)
    except Exception as error:
        found[str(i)] = np.array([f"{type(error).__name__}: {error}"])
np.savez(sys.argv[2], **found)
