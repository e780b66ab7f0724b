"""Chat templates: the model's own, a built-in one by name, or a Jinja file. transformers' sandbox renders them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpeft.data.text_files import read_text
from fastpeft.errors import UserError, first_line
from fastpeft.tasks.chat.conversations import RowFault

FILE = "chat_template.jinja"
"""As transformers names it beside a tokenizer's other files."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- 'Tools that may be called, as JSON:\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
{{- 'A call is <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- ('\\n' if message.content or not loop.first else '') + '<tool_call>\\n' }}
{{- call.function | tojson + '\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_ALPACA = """\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}
{%- if loop.first %}{{ 'Below is an instruction that describes a task' }}
{{- ', paired with an input that provides further context' if message.input }}
{{- '. Write a response that appropriately completes the request.\\n\\n' }}{% endif %}
{{- '### Instruction:\\n' + (message.instruction or message.content) + '\\n\\n' }}
{{- '### Input:\\n' + message.input + '\\n\\n' if message.input }}
{%- elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- else %}{{ raise_exception('the template alpaca has no role ' + message.role) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""
_PLAIN = """\
{%- for message in messages %}
{{- message.content + (eos_token if message.role == 'assistant' else '') + '\\n' }}
{%- endfor %}"""
NAMED: Mapping[str, str] = {"chatml": _CHATML, "alpaca": _ALPACA, "plain": _PLAIN}
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


Rendering = tuple[str, list[tuple[int, int]]]
"""A text, and where in it stands what the assistant generates: nowhere without marks."""


class ChatTemplate:
    """With the tokenizer whose special tokens it writes."""

    def __init__(self, text: str, tokenizer: Any, source: str) -> None:
        self.text, self.tokenizer, self.source = text, tokenizer, source
        self.has_marks = _MARK.search(text) is not None
        """It says itself what the assistant generates."""
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        known = (
            tokenizer.added_tokens_decoder.items() if tokenizer.is_fast and not tokenizer.split_special_tokens else ()
        )
        self.splits = {
            number: token.content
            for number, token in known
            if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        }
        """Tokens at which any text is split before it is tokenised, by number."""
        self.ends = frozenset(added | set(tokenizer.all_special_tokens))
        """Tokens that may end an answer, as texts."""
        kept = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        self._strips_right = tuple(text for text, token in kept.items() if token.rstrip)
        self._strips_left = tuple(text for text, token in kept.items() if token.lstrip)
        self._lengths = sorted({len(token) for token in self.ends}, reverse=True)
        self._may_end = re.compile(f"[{re.escape(''.join({token[0] for token in self.ends}))}]") if self.ends else None

    def __str__(self) -> str:
        return f"the chat template of {self.source}"

    def first_end(self, text: str) -> str | None:
        """The first token of `ends` that the text holds, the longest that begins there. Models may have thousands."""
        for found in self._may_end.finditer(text) if self._may_end is not None else ():
            at = found.start()
            token = next((text[at : at + n] for n in self._lengths if text[at : at + n] in self.ends), None)
            if token is not None:
                return token
        return None

    def takes_space(self, prompt: str, answer: str) -> bool:
        """Whether a token of the tokenizer's takes in white space at an end of an answer, as Phi-3's do behind them.

        Args:
            answer: with the token that ends it.
        """
        if answer[:1].isspace() and prompt.rstrip().endswith(self._strips_right):
            return True
        return any(answer.endswith(end) and answer[: -len(end)][-1:].isspace() for end in self._strips_left)

    @property
    def notes(self) -> list[str]:
        if "strftime_now" not in self.text:
            return []
        return [f"{self} writes today's date into its prompts: a run of another day reads another text"]

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), prompt: bool = False
    ) -> Rendering:
        """
        Args:
            prompt: for the assistant to go on from.

        Raises:
            RowFault: what the template raises.
        """
        return self.render_all([messages], tools, prompt)[0]

    def render_all(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        tools: Sequence[dict[str, Any]] = (),
        prompt: bool = False,
    ) -> list[Rendering]:
        """As `render` of each, in two thirds of the time. Raises RowFault where the template refuses any of them."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            found: Any = render_jinja_template(
                conversations=[list(messages) for messages in conversations],
                tools=list(tools) or None,
                chat_template=self.text,
                return_assistant_tokens_mask=self.has_marks,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # of Jinja, of the template's own, and of what it does to the row's values
            told = first_line(error).rstrip(".") or type(error).__name__
            raise RowFault(f"{self} refuses it: {told}") from error
        texts, marks = found
        return [*zip(texts, marks if self.has_marks else [[]] * len(texts), strict=True)]


def choose_template(setting: str | None, tokenizer: Any, model: str) -> ChatTemplate:
    """As dataset.template says; the tokenizer's own where it says nothing.

    Raises:
        UserError: there is none, no such file, or one that this tokenizer has no tokens for.
    """
    if setting is None:
        own = tokenizer.chat_template
        if own is None:
            raise UserError(
                f"model {model} has no chat template: set dataset.template to one of {', '.join(NAMED)}, or to a Jinja "
                "file"
            )
        text, source = own["default"] if isinstance(own, dict) else own, f"model {model}"
    elif setting in NAMED:
        text, source = _begun(NAMED[setting], tokenizer), f"dataset.template={setting}"
        _check_tokens(setting, tokenizer, model)
    else:
        path = Path(setting).expanduser()
        if not path.is_file():
            raise UserError(
                f"dataset.template {setting}: is none of {', '.join(NAMED)}, and there is no such file. Leave it out "
                "to take the model's own"
            )
        text, source = read_text(path)[0], str(path)
    return checked(ChatTemplate(text, tokenizer, source))


def template_file(setting: str | None) -> tuple[str, ...]:
    """Text of the file that dataset.template names; empty where it names none."""
    path = None if setting is None or setting in NAMED else Path(setting).expanduser()
    return (read_text(path)[0],) if path is not None and path.is_file() else ()


def checked(template: ChatTemplate) -> ChatTemplate:
    """Raises UserError for what is no Jinja."""
    from jinja2 import TemplateSyntaxError

    try:
        template.render([{"role": "user", "content": "a"}])
    except RowFault as error:  # what it makes of such a row is its own affair
        if isinstance(error.__cause__, TemplateSyntaxError):
            line = error.__cause__.lineno
            raise UserError(f"{template.source}: line {line} is no chat template: {error.__cause__}") from None
    return template


def _check_tokens(name: str, tokenizer: Any, model: str) -> None:
    if name != "chatml":
        if tokenizer.eos_token is None:
            raise UserError(f"dataset.template {name}: model {model} has no end-of-text token, which ends its answers")
        return
    known = tokenizer.get_vocab()
    lacking = [token for token in _CHATML_TOKENS if token not in known]
    if lacking:
        raise UserError(
            f"dataset.template {name}: model {model} has no token {' and '.join(lacking)}, so that no answer would "
            "end. alpaca and plain end answers by the end of text"
        )


def _begun(text: str, tokenizer: Any) -> str:
    """Behind the token that the tokenizer puts before any text."""
    first = tokenizer("a", return_attention_mask=False)["input_ids"][:1]
    begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return "{{- bos_token }}" + text if begins else text
