"""Decoding: transformers' own answers token by token, however they are batched, and nothing left behind."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from fastpeft.models import direct_decoder, layers
from fastpeft.tasks.causal_lm import decode_batches, generate
from fastpeft.tasks.causal_lm.decode_batches import FASTEST, STATIC, fastest_method
from fastpeft.tasks.causal_lm.generate import Answer, DecodeOptions, decode, pass_at_k
from tests.support.tiny import causal_model

VOCAB = 48
EOS = [1, 7, 9]
PAD = 0
MOST = 30

MODELS = {
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen3, half of it sliding": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen2": {},
    "gemma3_text": {"sliding_window": 12, "tie_word_embeddings": False, "query_pre_attn_scalar": 20,
                    "num_hidden_layers": 3,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "llama, rotated otherwise": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
                                                     "original_max_position_embeddings": 16}},
}  # fmt: skip
SEEDS = {"qwen2": 3, "gemma3_text": 3}
"""With which a random model's answers are not all alike."""
WAYS = {"direct": FASTEST, "static": STATIC}


def make(name="qwen3"):
    model = causal_model(name.partition(",")[0], SEEDS.get(name, 1), vocab_size=VOCAB, **MODELS[name]).eval()
    generator = torch.Generator().manual_seed(SEEDS.get(name, 1))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms of a trained model are not 0 or 1
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def adapted(seed=0, **config):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
    model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **settings | config))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    fastpeft.accelerate(model)
    return model.eval()


def make_prompts(num=10, seed=1):
    """Of 1 to 19 tokens. The seed is fixed: in fp32 one batch may round a near tie otherwise than another."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (num,), generator=generator).tolist()
    return [torch.randint(10, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def run(model, prompts, options=None, **more):
    settings = {"options": options or DecodeOptions(MOST), "eos_tokens": EOS, "pad_token": PAD, "max_tokens": 1000}
    return decode(model, prompts, **settings | more)


def reference(model, prompt, most=MOST):
    """What transformers generates for this prompt alone."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": most, "eos_token_id": EOS, "pad_token_id": PAD}
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    return Answer(tokens[:-1], True) if tokens[-1] in EOS else Answer(tokens, False)


@pytest.fixture
def compacted(monkeypatch):
    """Rows that each batch went on with."""
    sizes = []

    def note(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, rows: sizes.append(len(rows)) or real(self, rows))

    note(transformers.StaticCache, "reorder_cache")
    note(direct_decoder.Columns, "keep")
    return sizes


# ---- greedy --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_what_transformers_generates(name, way, compacted):
    model, prompts = make(name), make_prompts()
    assert fastest_method(model) == FASTEST
    found = run(model, prompts, method=WAYS[way])
    answers = [samples[0] for samples in found.answers]
    assert answers == [reference(model, prompt) for prompt in prompts]
    assert len({answer.ended for answer in answers}) == 2  # some end, some are cut
    assert len({answer.num_tokens for answer in answers}) > 4
    assert compacted
    assert found.num_tokens == sum(answer.num_tokens for answer in answers)
    assert found.seconds > 0


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapted_model_merged_or_not(merge, compacted, monkeypatch):
    model, prompts = adapted(), make_prompts(7)
    wanted = [[reference(model, prompt)] for prompt in prompts]
    calls = []
    real = layers.lora_linear
    monkeypatch.setattr(layers, "lora_linear", lambda *args, **more: calls.append(0) or real(*args, **more))
    found = run(model, prompts, merge=merge)
    assert found.answers == wanted
    assert wanted != run(make(), prompts).answers  # the adapter matters
    assert found.merged.num_merged == (10 if merge else 0)
    assert bool(calls) is not merge
    assert compacted


@pytest.mark.parametrize("max_tokens", [1, 130, 500])
def test_batches_change_no_answer(max_tokens):
    model, prompts = make(), make_prompts()
    assert run(model, prompts, max_tokens=max_tokens).answers == run(model, prompts, max_tokens=10**6).answers


def test_batches_keep_to_the_limit(monkeypatch):
    sizes = []
    real = generate._Decoder.answers

    def noted(self, rows, may_fail):
        sizes.append((len(rows), int(generate.cache_columns(max(len(self.prompts[row]) for row in rows), MOST))))
        return real(self, rows, may_fail)

    monkeypatch.setattr(generate._Decoder, "answers", noted)
    run(make(), make_prompts(), max_tokens=200)
    assert sum(rows for rows, _ in sizes) == 10
    assert all(rows * width <= 200 for rows, width in sizes)
    assert max(rows for rows, _ in sizes) > 2


@pytest.mark.parametrize("most", [1, 2, 8, 9])
def test_few_new_tokens(most):
    model, prompts = make(), make_prompts(5)
    found = run(model, prompts, DecodeOptions(most))
    assert found.answers == [[reference(model, prompt, most)] for prompt in prompts]


def test_an_answer_may_be_empty():
    model, prompt = make(), make_prompts(1)[0]
    first = reference(model, prompt).tokens[0]
    found = run(model, [np.array(prompt), prompt], eos_tokens=[first])
    assert found.answers == [[Answer([], True)]] * 2
    assert found.num_tokens == 2


def test_no_prompts():
    assert run(make(), []).answers == []


# ---- the device is not waited for ----------------------------------------------------------


_aten = torch.ops.aten
READING = (_aten.item, _aten._local_scalar_dense, _aten.is_nonzero, _aten.nonzero, _aten.equal)


class Reads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: a value that is read, an index made of a mask."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        self.num += packet in READING
        if packet in (_aten.index, _aten.index_put_):
            self.num += any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **kwargs or {})


def reads(most, model=None):
    with Reads() as found:
        run(model or make(), make_prompts(6), DecodeOptions(most), eos_tokens=[])
    return found.num


def test_steps_read_nothing_from_the_device():
    assert reads(MOST) == reads(2)


def test_a_step_that_reads_is_seen():
    model = make()
    model.register_forward_pre_hook(lambda *_: print(torch.ones(3)[torch.ones(3) > 0].sum().item()))
    assert reads(MOST, model) >= reads(2, model) + 2 * (MOST - 2)


# ---- sampling ------------------------------------------------------------------------------


def drawn(logits, uniforms, **options):
    many = torch.tensor(logits)[None].repeat(len(uniforms), 1)
    return generate._sample(many, torch.tensor(uniforms, dtype=torch.float32), DecodeOptions(1, **options)).numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.3), (0.7, 1e-9)])
def test_samples_have_the_probabilities_of_the_model(temperature, top_p, seed):
    logits = np.random.default_rng(seed).normal(size=12)
    exact = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    order = np.argsort(-exact)
    kept = order[: 1 + np.searchsorted(np.cumsum(exact[order]), top_p)] if top_p < 1 else order
    wanted = np.zeros(12)
    wanted[kept] = exact[kept] / exact[kept].sum()
    num = 4000
    found = drawn(logits.astype(np.float32), (np.arange(num) + 0.5) / num, temperature=temperature, top_p=top_p)
    assert np.abs(np.bincount(found, minlength=12) / num - wanted).max() < 2 / num


def test_extremes_of_chance():
    logits = [float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]
    assert drawn(logits, [0.0, 1 - 2**-24], temperature=1.0).tolist() == [1, 3]
    assert drawn(logits, [0.0, 1 - 2**-24], temperature=1e-40).tolist() == [3, 3]
    assert drawn(logits, [0.0, 1 - 2**-24], temperature=1.0, top_p=0.99).tolist() == [3, 1]


def test_samples_depend_on_seed_prompt_and_sample_alone():
    model, prompts = make().double(), make_prompts(5)
    prompts[3] = prompts[1]
    options = DecodeOptions(16, temperature=1.0, top_p=0.9, num_samples=3, seed=5)
    together, apart = (run(model, prompts, options, max_tokens=limit).answers for limit in (10**6, 1))
    assert together == apart
    assert [len(samples) for samples in together] == [3] * 5
    assert run(model, prompts[:2], options).answers == together[:2]
    assert len({tuple(answer.tokens) for answer in together[1] + together[3]}) > 4
    more = DecodeOptions(16, temperature=1.0, top_p=0.9, num_samples=3, seed=6)
    assert run(model, prompts, more).answers != together


def test_sampling_at_a_low_temperature_is_greedy():
    model, prompts = make(), make_prompts()
    assert run(model, prompts, DecodeOptions(MOST, temperature=1e-6)).answers == run(model, prompts).answers


# ---- pass@k --------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_all_choices():
    for num in range(1, 8):
        for right, k in itertools.product(range(num + 1), range(1, num + 1)):
            choices = list(itertools.combinations(range(num), k))
            share = sum(any(i < right for i in choice) for choice in choices) / len(choices)
            assert pass_at_k(right, num, k) == pytest.approx(share, abs=1e-15)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(0, 10_000, 100) == 0.0
    assert pass_at_k(9_901, 10_000, 100) == 1.0
    assert pass_at_k(1, 10_000, 100) == pytest.approx(0.01, abs=1e-14)


@pytest.mark.parametrize(("right", "num", "k"), [(-1, 3, 1), (4, 3, 1), (1, 3, 0), (1, 3, 4), (0, 0, 1)])
def test_pass_at_k_of_nonsense(right, num, k):
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(right, num, k)


# ---- what surrounds it ---------------------------------------------------------------------


def traces(model):
    """All that decoding might leave behind."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert not any(tensor.is_inference() for _, tensor in tensors)
    bits = {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in tensors}
    modes = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    return SimpleNamespace(bits=bits, rest=(modes, str(model.config), torch.get_rng_state().tolist()))


def assert_unchanged(before, model):
    after = traces(model)
    assert after.rest == before.rest
    assert after.bits.keys() == before.bits.keys()
    for name, (place, tensor) in before.bits.items():
        assert after.bits[name][0] == place, name
        assert torch.equal(after.bits[name][1], tensor), name


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails, monkeypatch):
    model = adapted().train()
    model.base_model.model.model.layers[0].eval()
    before = traces(model)
    if fails:
        monkeypatch.setattr(decode_batches.DecodeBatch, "append", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, make_prompts(3))
    else:
        run(model, make_prompts(3), DecodeOptions(9, temperature=1.0))
    assert_unchanged(before, model)
    monkeypatch.undo()
    ids = torch.tensor(make_prompts(1))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_stop_ends_it():
    model, asked = adapted().train(), []
    before = traces(model)
    assert run(model, make_prompts(), stop=lambda: asked.append(0) or len(asked) == 3, eos_tokens=[]) is None
    assert len(asked) == 3
    assert_unchanged(before, model)
    asked.clear()
    run(model, make_prompts(), stop=lambda: bool(asked.append(0)), eos_tokens=[])
    assert len(asked) == 1 + (MOST - 1) // generate.CHECK_EVERY
    assert run(model, make_prompts(), DecodeOptions(1), stop=lambda: True) is None


def test_out_of_memory_goes_on_in_smaller_batches(monkeypatch):
    model, prompts = make(), make_prompts()
    wanted = run(model, prompts).answers
    real, shrunk = model.forward, []

    def small(input_ids, **more):
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("no room")
        return real(input_ids=input_ids, **more)

    def shrink(num_rows, width):
        shrunk.append((num_rows, width))
        return num_rows * width // 2

    monkeypatch.setattr(model, "forward", small)
    with pytest.raises(torch.OutOfMemoryError):
        run(model, prompts)
    assert run(model, prompts, shrink=shrink).answers == wanted
    assert shrunk[0] == (10, 24 + 32)
    assert [rows for rows, _ in shrunk] == sorted((rows for rows, _ in shrunk), reverse=True)


def test_another_error_is_not_memory():
    model = make()
    model.forward = lambda **_: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        run(model, make_prompts(2), shrink=lambda *_: pytest.fail("it was no lack of memory"))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"num_samples": 0},
        {"num_samples": 2},
        {"seed": -1},
    ],
)
def test_options_that_mean_nothing(options):
    with pytest.raises(ValueError, match=r"at least|same answer"):
        DecodeOptions(**{"max_new_tokens": 4} | options)


def test_an_empty_prompt_is_named():
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        run(make(), [[5], [6], [], [7]], DecodeOptions(4, temperature=1.0, num_samples=2))


def test_notes_need_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer"):
        run(make(), [[5]], complete=str)
