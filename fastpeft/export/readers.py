"""Who else reads an export, and what each takes: from the readers' own sources, or seen by running them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from fastpeft.errors import UserError

_NO_PLAIN_UPDATE = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "a bias in B (lora_bias)",
    "use_qalora": "QALoRA's groups",
    "layer_replication": "replicated layers",
    "target_parameters": "updates of bare parameters (target_parameters)",
    "trainable_token_indices": "single trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "an update that a token switches on (aLoRA)",
}
"""What PEFT can put beside or in place of s B A, by its key in adapter_config.json."""


@dataclass(frozen=True)
class Reader:
    """One that is not PEFT."""

    key: str
    """Of --for."""
    title: str
    version: str
    """That what is said here was read or run in."""
    heads: frozenset[str] = frozenset()
    """Modules that it takes whole from an adapter (PEFT's modules_to_save): one linear layer, and one of them."""
    ranks: tuple[int, ...] = ()
    """That it has memory for; smaller ones are padded. Empty: any."""
    stacked: tuple[tuple[str, ...], ...] = ()
    """Projections that it computes as one, and cannot load where an adapter has only some of them."""
    drops: frozenset[tuple[str, str]] = frozenset()
    """(model_type, rope_type) of models whose rotary scaling it leaves out."""
    own_files: bool = False
    """It reads files of its own, and not PEFT's."""
    causal_only: bool = False
    """It has no heads of encoders, in a merged model either."""

    @property
    def name(self) -> str:
        return f"{self.title} {self.version}"


_ALL = (
    Reader(
        "vllm",
        "vLLM",
        "0.33.0",
        heads=frozenset({"classifier", "score"}),
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    ),
    Reader("sglang", "SGLang", "0.5.23", stacked=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))),
    Reader(
        "llama.cpp",
        "llama.cpp",
        "(llama-cpp-python 0.3.36)",
        drops=frozenset({("qwen2", "llama3"), ("qwen3", "llama3")}),
        causal_only=True,
    ),
    Reader("mlx", "mlx-lm", "0.32.2", own_files=True, causal_only=True),
)
READERS = {reader.key: reader for reader in _ALL}
PEFT = "peft"


def find_reader(name: str) -> Reader | None:
    """None for PEFT itself.

    Raises:
        UserError: no such reader.
    """
    if name == PEFT:
        return None
    if name not in READERS:
        known = [PEFT, *READERS]
        near = difflib.get_close_matches(name.lower(), known, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--for {name!r}: expected one of {', '.join(known)}{guess}")
    return READERS[name]


@dataclass(frozen=True)
class Contents:
    """What an adapter's two files hold beside its updates."""

    config: dict[str, Any]
    whole: tuple[str, ...] = ()
    """Tensors that replace one of the base model's, or add to them: a trained head, embeddings."""


def check_adapter(reader: Reader, contents: Contents) -> None:
    """Refuse what the reader would drop, or stop at.

    Raises:
        UserError: which part it cannot hold, and what can be done.
    """
    beyond = [what for key, what in _NO_PLAIN_UPDATE.items() if contents.config.get(key)]
    if contents.config.get("bias", "none") != "none":
        beyond.append(f"trained biases (bias {contents.config['bias']})")
    if beyond:
        raise UserError(f"{reader.name} cannot hold {', '.join(beyond)}; export with --merge instead")
    heads = sorted({name.removeprefix("base_model.model.").rsplit(".", 1)[0] for name in contents.whole})
    if not heads or (len(heads) == 1 and heads[0] in reader.heads):
        return
    takes = f"takes only a trained {' or '.join(sorted(reader.heads))} that is one layer" if reader.heads else ""
    raise UserError(
        f"the adapter holds trained weights of {', '.join(heads)} besides its updates, and {reader.name} "
        f"{takes or 'has no place for any in an adapter'}; export with --merge instead"
    )


def check_merged(reader: Reader, task_type: str) -> None:
    """Refuse a merged model that the reader has no head for. `task_type`: PEFT's word.

    Raises:
        UserError: it is no causal language model, and the reader reads no others.
    """
    if reader.causal_only and task_type != "CAUSAL_LM":
        raise UserError(
            f"{reader.name} reads causal language models, and has no place for the head that this task "
            f"({task_type}) has trained; leave --for {reader.key} out"
        )


def check_base(reader: Reader, config: dict[str, Any]) -> None:
    """Refuse a model that the reader computes otherwise. `config`: of the base model.

    Raises:
        UserError: it leaves out the model's rotary scaling.
    """
    kind, rope = config.get("model_type", ""), config.get("rope_parameters") or {}
    if (kind, rope.get("rope_type")) in reader.drops:
        raise UserError(
            f"{reader.name} leaves out the {rope['rope_type']} scaling of the positions of a {kind} model, so that its "
            "answers would be others; there is no export of this model for it"
        )


def fitting_rank(reader: Reader, rank: int) -> int:
    """The rank to pad to.

    Raises:
        UserError: it is over what the reader takes.
    """
    if not reader.ranks:
        return rank
    for fits in reader.ranks:
        if rank <= fits:
            return fits
    raise UserError(
        f"the adapter's rank is {rank}, and {reader.name} takes at most {reader.ranks[-1]}; give --trim 0.999 to "
        "lower it, or export with --merge"
    )
