"""How each reader is given an export, for its card."""

from __future__ import annotations

from fastpeft.export.readers import Reader

FOLDER = "path/to/this/folder"

_ADAPTER = {
    "vllm": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}",
    "sglang": "python -m sglang.launch_server --model-path {base} --lora-paths {name}={folder}",
    "llama.cpp": (
        "python convert_hf_to_gguf.py {base} --outfile base.gguf   # a folder; once\n"
        "python convert_lora_to_gguf.py --base {base} --outfile {name}.gguf {folder}\n"
        "llama-cli -m base.gguf --lora {name}.gguf"
    ),
    "mlx": "mlx_lm.generate --model {base} --adapter-path {folder} --ignore-chat-template --prompt PROMPT",
}
_MERGED = {
    "vllm": "vllm serve {folder}",
    "sglang": "python -m sglang.launch_server --model-path {folder}",
    "llama.cpp": ("python convert_hf_to_gguf.py {folder} --outfile {name}.gguf\nllama-cli -m {name}.gguf"),
    "mlx": "mlx_lm.generate --model {folder} --ignore-chat-template --prompt PROMPT",
}

_MLX = """\
from mlx_lm import generate, load

{load}
{prompt}print(generate(model, tokenizer, prompt=prompt, max_tokens={max_length}))
"""


def commands(reader: Reader, merged: bool, base: str, name: str, rank: int | None) -> str:
    """Lines of a shell.

    Args:
        base: what loads the base model.
        name: that the adapter is to have there.
        rank: of an adapter.
    """
    lines = (_MERGED if merged else _ADAPTER)[reader.key]
    return lines.format(base=base, name=name, rank=rank, folder=FOLDER)


def mlx_example(merged: bool, base: str, prompt: str, max_length: int) -> str:
    """Python for mlx-lm. `prompt`: lines that set `prompt`."""
    call = f"load({FOLDER!r})" if merged else f"load({base!r}, adapter_path={FOLDER!r})"
    load = f"model, tokenizer = {call}".replace("'", '"')
    return _MLX.format(load=load, prompt=prompt, max_length=max_length)
