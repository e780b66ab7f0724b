"""Small chat templates after what those in use do, and tokenizers that go with them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN2 = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role in ('system', 'user', 'assistant') and not message.tool_calls %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant' }}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content, reasoning = message.content, '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- elif message.reasoning_content %}{% set reasoning = message.reasoning_content %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- content + '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LLAMA2 = """\
{%- if messages[0].role == 'system' %}
{%- set system, messages = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n', messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}
{{- message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\\n' + (message.content | trim) + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'system' %}{{ '[SYSTEM_PROMPT] ' + message.content + '[/SYSTEM_PROMPT]' }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
{%- else %}{{ raise_exception('Only user, system and assistant roles') }}{% endif %}
{%- endfor %}"""
PHI3 = """\
{%- for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
SMOLLM3 = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
ZEPHYR = """\
{%- for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""
VICUNA = """\
{%- if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set messages = messages[1:] %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}
{%- else %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
DEEPSEEK = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- else %}
{%- set content = message.content.split('</think>')[-1] %}{{ '<|Assistant|>' + content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML, "qwen2": QWEN2, "qwen3": QWEN3, "llama3": LLAMA3, "llama2": LLAMA2, "gemma": GEMMA,
    "mistral": MISTRAL, "phi3": PHI3, "smollm3": SMOLLM3, "zephyr": ZEPHYR, "vicuna": VICUNA, "deepseek": DEEPSEEK,
}  # fmt: skip


class Does(NamedTuple):
    """What a template does that the tests have to know."""

    end: str
    """Ends an answer."""
    lead: str = ""
    """Stands before the last answer, and has to be written by the assistant."""
    trims: bool = False
    takes_system: bool = True
    alternates: bool = False


DOES = {
    "chatml": Does("<|im_end|>"),
    "qwen2": Does("<|im_end|>"),
    "qwen3": Does("<|im_end|>", lead="<think>\n\n</think>\n\n"),
    "llama3": Does("<|eot_id|>", trims=True),
    "llama2": Does(" </s>", lead=" ", alternates=True),
    "gemma": Does("<end_of_turn>", trims=True, takes_system=False, alternates=True),
    "mistral": Does("</s>", lead=" "),
    "phi3": Does("<|end|>"),
    "smollm3": Does("<|im_end|>"),
    "zephyr": Does("</s>"),
    "vicuna": Does("</s>", lead=" "),
    "deepseek": Does("</s>"),
}
SPECIAL = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|User|>",
    "<|Assistant|>", "[INST]", "[/INST]",
)  # fmt: skip
_TEXTS = ["ASSISTANT: the answer is in the  text of user\n\n assistant\n", "hello there 12 + 30 = 42, so it is\n\n\n"]


@cache
def byte_tokenizer() -> Any:
    """Byte-level BPE with merges over spaces and line ends, as most are today, and special tokens of all templates."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw.decoder, raw.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        show_progress=False,
    )
    raw.train_from_iterator(_TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


@cache
def piece_tokenizer() -> Any:
    """As SentencePiece's: a space before each text becomes part of its first token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[
            AddedToken(token, special=True, normalized=False)
            for token in (*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)))
        ],
        show_progress=False,
    )
    raw.train_from_iterator(_TEXTS * 20 + list(map(chr, range(32, 127))) * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
