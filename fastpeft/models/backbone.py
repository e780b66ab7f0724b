"""Load a pretrained model: a classifier, or a causal language model. No code from a repository is ever run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fastpeft.config.schema import ModelConfig
from fastpeft.errors import UnavailableError, UserError, first_line
from fastpeft.models.fast import speed_up
from fastpeft.models.files import fetch_model, refuse_hub_code
from fastpeft.models.lm_head import check_causal_lm, decoder_of, hidden_states, output_embeddings
from fastpeft.models.nf4 import never_repack, nf4_arguments
from fastpeft.models.positions import position_limit
from fastpeft.models.pretrained_head import fit_head
from fastpeft.models.vocabulary import add_embeddings, missing_tokens, num_embeddings, set_padding
from fastpeft.standins import embedded_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROW = "base.resize_token_embeddings(len(tokenizer))"
PAD = "base.config.get_text_config().pad_token_id = tokenizer.pad_token_id"
"""Template of a line of Backbone.fitting."""

_HEAD_NAMES = ("classifier", "score")
_OTHER_TASKS = ("Classification", "MaskedLM", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")
_USUAL_WIDTH = 768
_INNER_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass
class Backbone:
    """A pretrained model, and the facts about it that training needs."""

    model: PreTrainedModel
    """A transformers model in eval mode; no parameter requires a gradient."""
    tokenizer: Any
    """Has a padding token. The tokenizer of a causal LM without one pads with its end of sequence token."""
    head: list[str]
    """Top-level modules whose weights are all trained, in fp32: a classifier's head, and modules without pretrained
    weights. Empty for a causal LM, whose head is pretrained."""
    reads_segments: bool
    """Whether the model has token type embeddings and its tokenizer returns token type ids. If it returns none, other
    callers of the model leave them at 0, and so does training."""
    max_positions: int | None
    """Longest sequence that the model supports, in tokens; None if unbounded."""
    dtype: torch.dtype
    """Compute dtype of the model."""
    task_type: str
    """PEFT's TaskType of the model."""
    entry_points: list[nn.Module]
    """Modules that training calls: the model; for a causal LM also its decoder, whose hidden states training reads."""
    eos_token_ids: tuple[int, ...] = ()
    """End of sequence tokens of a causal LM: the tokenizer's first, then those of its generation config."""
    has_own_head: bool = False
    """True if a classifier's output layer comes from the checkpoint, because its labels match the task's."""
    head_is_frozen: bool = False
    """True if a causal LM's head stays the pretrained one, as linear_cross_entropy requires. False if the whole model
    is trained or the head has rows for new tokens, and for classifiers."""
    num_embeddings: int | None = None
    """Number of tokens with an embedding; None for models that read characters or bytes."""
    trains_all: bool = False
    """True if every weight is trained."""
    new_tokens: dict[str, list[int]] = field(default_factory=dict)
    """Name of an embedding, or of a language model's head -> indices of its rows that are new. These rows are trained
    with every method."""
    notes: list[str] = field(default_factory=list)
    """Messages for the user on how the model was loaded."""
    fitting: list[str] = field(default_factory=list)
    """Lines of Python that adjust a freshly loaded `base` to `tokenizer`, as this model was adjusted."""


def load_classifier(
    config: ModelConfig,
    *,
    auto_class: str,
    task_type: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    trained: bool = False,
) -> Backbone:
    """Load weights, tokenizer and head.

    The checkpoint's output layer is kept only if the names of its labels are the task's. Otherwise it is drawn from
    torch's RNG. The weights are cast to `dtype`, but stay fp32 if they are `trained`.

    Args:
        auto_class: class of transformers, such as AutoModelForSequenceClassification.
        task_type: PEFT's name of the task type.
        settings: values for the model's config, such as num_labels and id2label.

    Raises:
        UnavailableError: the folder or repository holds no usable model.
        UserError: model.quantisation is set, which only causal language models support.
    """
    tokenizer, model, stored, info = _read_classifier(config, auto_class, settings)
    _name_base(model, config)
    output, has_own_head, head_notes = fit_head(model, stored, settings, info)
    head = _head_modules(model, info, config.name, output)
    new_tokens, notes = _grow_vocabulary(model, tokenizer, config)
    fitting = [GROW] if new_tokens else []
    if model.config.get_text_config().pad_token_id != tokenizer.pad_token_id or tokenizer.pad_token_id is None:
        notes += set_padding(model, tokenizer, config.name)
        fitting.append(PAD)
    freeze(model, head, torch.float32 if trained else dtype, device)
    if config.fast_layers:
        speed_up(model)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        head=head,
        reads_segments=getattr(model.config, "type_vocab_size", 0) > 1
        and "token_type_ids" in tokenizer.model_input_names,
        max_positions=_max_positions(model, tokenizer, lambda ids_1L: model(input_ids=ids_1L)),
        num_embeddings=num_embeddings(model),
        dtype=dtype,
        task_type=task_type,
        entry_points=[model],
        has_own_head=has_own_head,
        trains_all=trained,
        new_tokens={} if trained else new_tokens,
        notes=[*head_notes, *notes],
        fitting=fitting,
    )


def _read_classifier(config: ModelConfig, auto_class: str, settings: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Tokenizer, model, the stored config, and transformers' loading info."""
    import transformers

    if config.quantisation != "none":
        raise UserError(
            f"model.quantisation {config.quantisation}: is for causal language models, and this task trains a "
            "classifier; leave it out"
        )
    with _loading(config, "a classifier") as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
        stored, asked = (transformers.AutoConfig.from_pretrained(folder, **_LOCAL) for _ in range(2))
        for key, value in ({"problem_type": None} | settings).items():  # the checkpoint's problem_type must not persist
            setattr(asked, key, value)
        model, info = getattr(transformers, auto_class).from_pretrained(
            folder,
            config=asked,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            **_LOCAL,
        )
    return tokenizer, model, stored, info


def _grow_vocabulary(
    model: PreTrainedModel, tokenizer: Any, config: ModelConfig
) -> tuple[dict[str, list[int]], list[str]]:
    """(Backbone.new_tokens, messages for the user)."""
    missing = missing_tokens(model, tokenizer, config.name)
    if not missing:
        return {}, []
    if config.quantisation != "none":
        raise UserError(
            f"model.quantisation {config.quantisation}: the tokenizer of {config.name} has {len(missing):,} tokens "
            "that the model has no embedding for, and a model in 4 bits does not grow. Leave it out, or add the "
            "embeddings to the model first, with resize_token_embeddings"
        )
    with quiet_transformers():
        note = add_embeddings(model, tokenizer, missing)
    grown = [model.get_input_embeddings(), output_embeddings(model)]
    return {name: missing for name, module in model.named_modules() if any(module is g for g in grown)}, [note]


def _max_positions(model: PreTrainedModel, tokenizer: Any, run: Callable[[torch.Tensor], Any]) -> int | None:
    """The longest sequence that the model has positions for; None if unbounded."""
    rows = num_embeddings(model)
    token = next(number for number in range((rows or 3) - 1, -1, -1) if number != tokenizer.pad_token_id)
    training = model.training
    model.eval()
    try:
        with quiet_transformers():
            return position_limit(model.config.get_text_config(decoder=True), token, model.device, run)
    finally:
        model.train(training)


def load_causal_lm(config: ModelConfig, dtype: torch.dtype, device: torch.device, trained: bool = False) -> Backbone:
    """Load a causal language model with its pretrained head.

    The weights are in `dtype`, or in fp32 if they are `trained`. Tensors that transformers keeps in fp32, such as
    rotary frequencies, stay in fp32. With `model.quantisation` nf4 the linear layers inside the blocks are stored in 4
    bits and computed in `dtype` (QLoRA, arXiv:2305.14314).

    Raises:
        UnavailableError: the folder or repository holds no usable causal language model.
        UserError: the logits are not a linear map of the hidden states; nf4 without bitsandbytes.
    """
    import transformers

    quantised = nf4_arguments(dtype, device) if config.quantisation == "nf4" else {}
    with _loading(config, "a causal language model") as folder:
        settings = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        _check_config(settings, config.name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32 if trained else dtype, **quantised, **_LOCAL
        )
        model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", found)  # a pair with output_loading_info
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info.get("mismatched_keys", ()))})
    if lacking:
        raise UnavailableError(
            f"model.name {config.name}: is no whole causal language model: it lacks {len(lacking)} weights of "
            f"{type(model).__name__}, such as {lacking[0]}"
        )
    _name_base(model, config)
    new_tokens, notes = _grow_vocabulary(model, tokenizer, config)
    model.requires_grad_(False)
    if quantised:
        never_repack(model)
    else:
        cast(nn.Module, model).to(device)  # transformers' signature has no device
    model.eval()
    eos_token_ids = _end_tokens(model, tokenizer, config.name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(eos_token_ids[0])
    with quiet_transformers():
        check_causal_lm(model, config.name)
    if config.fast_layers:
        speed_up(model, decoder_of(model))
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        head=[],
        reads_segments=False,
        max_positions=_max_positions(model, tokenizer, lambda ids_1L: hidden_states(model, ids_1L)),
        num_embeddings=num_embeddings(model),
        dtype=dtype,
        task_type="CAUSAL_LM",
        entry_points=[model, decoder_of(model)],
        eos_token_ids=eos_token_ids,
        head_is_frozen=not trained and not new_tokens,
        trains_all=trained,
        new_tokens={} if trained else new_tokens,
        notes=notes,
        fitting=[GROW] if new_tokens else [],
    )


def load_tokenizer(config: ModelConfig) -> Any:
    """Load a model's tokenizer, without the model's weights.

    Raises:
        UnavailableError: the folder or repository holds no usable tokenizer.
    """
    import transformers

    with _loading(config, "a tokenizer") as folder:
        return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)


@contextmanager
def _loading(config: ModelConfig, what: str) -> Iterator[Path]:
    """Context with the model's folder, downloaded if needed. Errors inside are raised as UnavailableError."""
    local = embedded_path(config.name) or Path(config.name).expanduser()
    folder = local if local.is_dir() else fetch_model(config.name, config.revision)
    refuse_hub_code(folder, config.name)
    try:
        with quiet_transformers():
            yield folder
    except UserError:
        raise
    except Exception as error:  # a damaged file: each library raises its own classes
        reason = first_line(error) or type(error).__name__
        raise UnavailableError(f"model.name {config.name}: cannot be loaded as {what}: {reason}") from error


def _name_base(model: PreTrainedModel, config: ModelConfig) -> None:
    """Set the base model's name that the adapter stores: a hub model's name rather than its folder in the cache."""
    if embedded_path(config.name) is None and not Path(config.name).expanduser().is_dir():
        model.name_or_path = model.config._name_or_path = config.name


def _check_config(settings: Any, name: str) -> None:
    """Refuse models that are not causal language models or are already quantised, before any weight is read."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stored = getattr(settings, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise UnavailableError(
            f"model.name {name}: its weights are quantised ({getattr(method, 'value', method)}). Take the unquantised "
            "model of the same name; model.quantisation=nf4 holds it in 4 bits"
        )
    architecture = next(iter(getattr(settings, "architectures", None) or ()), "")
    kind = architecture or settings.model_type
    if (
        settings.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or getattr(settings, "is_encoder_decoder", False)
        or architecture.endswith(_OTHER_TASKS)
    ):
        raise UnavailableError(
            f"model.name {name}: is {kind}, and no causal language model as this task needs one, such as "
            "Qwen3ForCausalLM or LlamaForCausalLM"
        )


def _end_tokens(model: PreTrainedModel, tokenizer: Any, name: str) -> tuple[int, ...]:
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    num_rows = num_embeddings(model)
    assert num_rows is not None, "check_causal_lm comes after"
    known = dict.fromkeys(i for i in (tokenizer.eos_token_id, *listed) if i is not None and i < num_rows)
    if not known:
        raise UnavailableError(
            f"model.name {name}: neither its tokenizer nor its generation config names an end of sequence, so that no "
            "answer would end"
        )
    return tuple(known)


@contextmanager
def quiet_transformers(keep_bars: bool = False) -> Iterator[None]:
    """Suppress progress bars, advice and deprecation warnings of transformers, whose old names PEFT and fastpeft use to
    support all releases. `keep_bars` keeps the progress bars of downloads."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled() and not keep_bars
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def layer_shape(config: ModelConfig) -> tuple[int, int]:
    """(in, out) of the model's feed-forward layers by its config, with common values for what it lacks."""
    import transformers

    with _loading(config, "a model") as folder:
        try:
            settings: Any = transformers.AutoConfig.from_pretrained(folder, **_LOCAL).get_text_config()
        except Exception:  # the following load reports what is wrong with the config
            settings = None
    width = getattr(settings, "hidden_size", _USUAL_WIDTH)
    named = (getattr(settings, name, None) for name in _INNER_WIDTHS)
    return width, next((inner for inner in named if isinstance(inner, int)), 4 * width)


def freeze(model: nn.Module, head: list[str], dtype: torch.dtype, device: torch.device) -> None:
    """Move the model to `device` in `dtype`, with its head in fp32. No parameter requires a gradient afterwards."""
    model.requires_grad_(False)
    model.to(device=device, dtype=dtype)
    for module in head:
        _keep_fp32(model.get_submodule(module))


def _head_modules(model: nn.Module, info: dict[str, Any], name: str, output: str | None) -> list[str]:
    """The output layer's module, and modules outside of the encoder without weights in the checkpoint."""
    children = dict(model.named_children())
    lacking = set(info["missing_keys"]) | {key for key, *_ in info.get("mismatched_keys", ())}
    fresh = {key.split(".")[0] for key in lacking}
    encoder = getattr(model, "base_model_prefix", "")
    if encoder in fresh:
        inner = sorted(k for k in lacking if k.startswith(f"{encoder}.") and ".pooler." not in k)
        if inner:
            raise UnavailableError(
                f"model.name {name}: the checkpoint lacks {len(inner)} weights of the encoder, such as {inner[0]}"
            )
        fresh = (fresh - {encoder}) | {f"{encoder}.pooler"}
    named = (*_HEAD_NAMES, (output or "").split(".")[0])
    return [n for n in children if n in fresh or n in named] + sorted(n for n in fresh if "." in n)


def _keep_fp32(module: nn.Module) -> None:
    """Keep a head in fp32 for inputs of any dtype."""

    def widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    module.float()
    module.register_forward_pre_hook(widen)
