"""How each reader is given an export, for its card."""

from __future__ import annotations

import json
import shlex

from fastpeft.export.readers import Reader

FOLDER = "path/to/this/folder"

_ADAPTER = {
    "vllm": "vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}",
    "sglang": "python -m sglang.launch_server --model-path {model} --lora-paths {name}={folder}",
    "llama.cpp": (
        "python convert_hf_to_gguf.py {convert} --outfile base.gguf\n"
        "python convert_lora_to_gguf.py {convert_base} --outfile {name}.gguf {folder}\n"
        "llama-cli -m base.gguf --lora {name}.gguf"
    ),
    "mlx": "mlx_lm.generate --model {base} --adapter-path {folder} --ignore-chat-template --prompt PROMPT",
}
_MERGED = {
    "vllm": "vllm serve {folder}",
    "sglang": "python -m sglang.launch_server --model-path {folder}",
    "llama.cpp": "python convert_hf_to_gguf.py {folder} --outfile {name}.gguf\nllama-cli -m {name}.gguf",
    "mlx": "mlx_lm.generate --model {folder} --ignore-chat-template --prompt PROMPT",
}

_MLX = """\
from mlx_lm import generate, load

model, tokenizer = load({arguments})
{prompt}print(generate(model, tokenizer, prompt=prompt, max_tokens={max_length}))
"""


def commands(reader: Reader, merged: bool, base: str, revision: str | None, name: str, rank: int | None) -> str:
    """Lines of a shell.

    Args:
        base: a folder, or a name on the hub.
        revision: of a name on the hub; None of a folder.
        name: that the adapter is to have there.
        rank: of an adapter.
    """
    base, name, on_hub = shlex.quote(base), shlex.quote(name), revision is not None
    return (_MERGED if merged else _ADAPTER)[reader.key].format(
        base=base,
        model=base if revision in (None, "main") else f"{base} --revision {shlex.quote(revision)}",
        convert=f"--remote {base}" if on_hub else base,
        convert_base=f"--base-model-id {base}" if on_hub else f"--base {base}",
        name=name,
        rank=rank,
        folder=FOLDER,
    )


def mlx_example(merged: bool, base: str, prompt: str, max_length: int) -> str:
    """Python for mlx-lm. `prompt`: lines that set `prompt`."""
    folder = json.dumps(FOLDER)
    arguments = folder if merged else f"{json.dumps(base)}, adapter_path={folder}"
    return _MLX.format(arguments=arguments, prompt=prompt, max_length=max_length)
