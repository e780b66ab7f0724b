"""What a host with a dictionary computes, and the gradient of every part of it, against the equations in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from fastpeft.adapters.unihyperlora import layer, probe
from fastpeft.adapters.unihyperlora.cost import extra_flops, host_flops
from fastpeft.adapters.unihyperlora.dictionary import Dictionary, Shape
from fastpeft.adapters.unihyperlora.projectors import Fixed, spectral
from tests.support.atom_hosts import SMALL, Literal, dictionary, host_model, put_in, sites_of
from tests.support.tiny import save_tokenizer

PROJECTORS = ["coordinate", "spectral", "probe"]


def batch(seed: int, num_rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 32, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def fixed_of(projector: str, model: torch.nn.Module, shape: Shape) -> dict[str, Fixed]:
    """`probe`: projections as it makes them, of made-up activations."""
    if projector == "coordinate":
        return {}
    sites = sites_of(model)
    if projector == "spectral":
        return {site.name: spectral(model.get_submodule(site.name).weight, shape.width) for site in sites}
    draw = torch.Generator().manual_seed(3)

    def made(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw) * 0.3

    read = {(s.layer, s.reads): (made(s.num_in, shape.width), made(shape.width)) for s in sites}
    return {
        s.name: Fixed(read[s.layer, s.reads][0], made(s.num_out, shape.width), read[s.layer, s.reads][1]) for s in sites
    }


def shape_of(projector: str) -> Shape:
    return Shape(**{**vars(SMALL), "projector": projector})


def as_double(fixed: dict[str, Fixed]) -> dict[str, Fixed]:
    together: dict[int, torch.Tensor] = {}
    return {
        name: Fixed(
            together.setdefault(id(one.phi_in), one.phi_in.double()),
            one.phi_out.double(),
            None if one.offset is None else one.offset.double(),
        )
        for name, one in fixed.items()
    }


@pytest.mark.parametrize("projector", PROJECTORS)
def test_values_and_every_gradient(projector: str, seed: int) -> None:
    shape = shape_of(projector)
    fixed = fixed_of(projector, host_model(), shape)
    ours, theirs = dictionary(shape, seed).double(), dictionary(shape, seed).double()
    model, literal = host_model().double(), host_model().double()
    host = put_in(model, ours, as_double(fixed))
    reference = Literal(literal, theirs, fixed)
    inputs = batch(seed)
    got, want = model(**inputs).logits, literal(**inputs).logits
    torch.testing.assert_close(got, want)
    plain = host_model().double()(**inputs).logits
    assert float((got - plain).detach().norm()) > 1e-2 * float(plain.norm())
    for logits in (got, want):
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
        torch.testing.assert_close(parameter.grad, named[name].grad, msg=lambda text, name=name: f"{name}: {text}")
    weight = inputs["attention_mask"].double().flatten()[:, None]
    gates = [gate for gate in reference.gates if len(gate) == len(weight)]
    routed = gates if projector != "spectral" else None
    if routed is not None:
        assert len(routed) == 8
        assert float(host.count.num_active) == pytest.approx(float(sum((g * weight).sum() for g in routed)))
        assert float(host.count.num_tokens) == 8 * float(weight.sum())


def test_in_fp32_the_gradients_are_those_up_to_rounding(seed: int) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        made, model = dictionary(seed=seed).to(dtype), host_model().to(dtype)
        put_in(model, made)
        model(**batch(seed)).logits.square().sum().backward()
        found.append(torch.cat([p.grad.double().flatten() for p in made.parameters()]))
    assert float((found[0] - found[1]).norm()) <= 1e-4 * float(found[1].norm())


@pytest.mark.parametrize("width", [24, 32, 48])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_host_of_any_size_needs_no_new_parameter(width: int, layers: int, seed: int) -> None:
    made = dictionary(seed=seed)
    model = host_model(width, layers)
    before = {name for name, _ in model.named_parameters()}
    inputs = batch(seed)
    plain = model(**inputs).logits
    host = put_in(model, made)
    adapted = model(**inputs).logits
    assert {name for name, _ in model.named_parameters()} == before
    assert not torch.allclose(adapted, plain, atol=1e-4)
    host.detach()
    torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_token_has_more_atoms_than_it_may(top_k: int, seed: int) -> None:
    shape = Shape(**{**vars(SMALL), "top_k": top_k})
    model, made = host_model().double(), dictionary(shape, seed).double()
    host = put_in(model, made)
    model(**batch(seed)).logits.sum().backward()
    assert 0 < float(host.count.num_active) <= top_k * float(host.count.num_tokens)


def test_layers_that_read_one_tensor_are_routed_once_and_no_others(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = layer.route_atoms
    monkeypatch.setattr(layer, "route_atoms", lambda z, *a, **k: calls.append(z.shape[0]) or real(z, *a, **k))
    model = host_model()
    put_in(model, dictionary(seed=seed))
    model(**batch(seed))
    assert calls == [27] * 8


def addmm_in_place(y: list[int], a: list[int], b: list[int], **more: object) -> int:
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("projector", PROJECTORS)
def test_flops_by_formula_are_those_that_torch_counts(projector: str) -> None:
    """Under attention's math kernel, whose products it sees; of products in place it has to be told. A classifier's
    head reads one token a row."""
    shape, num_tokens = shape_of(projector), 16
    inputs = {"input_ids": torch.ones(1, num_tokens, dtype=torch.long)}
    model = host_model()

    def counted() -> int:
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place})
        with torch.no_grad(), counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(**inputs)
        return counter.get_total_flops()

    plain, head = counted(), 2 * (32 * 32 + 32 * 3)
    assert plain - head == num_tokens * host_flops(model, num_tokens)
    made = Dictionary(shape)
    fixed = fixed_of(projector, model, shape)
    sites = sites_of(model)
    put_in(model, made, fixed)
    fold = FlopCounterMode(display=False)
    with torch.no_grad(), fold:
        model.bert.encoder.layer[0].attention.self.query.host.fold()
    assert counted() - plain - fold.get_total_flops() == num_tokens * extra_flops(sites, shape)


def test_the_probe_reads_its_words_in_every_layer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "bert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = host_model()
    sites = sites_of(model)
    inputs, outputs = probe.activations(model, tokenizer, sites)
    assert len(inputs) == 8
    assert {len(x) for x in (*inputs.values(), *outputs.values())} == {probe.NUM_WORDS}
    assert {name: y.shape[1] for name, y in outputs.items()} == {site.name: site.num_out for site in sites}
    codes = probe.make_codes(model, tokenizer, sites, 5)
    assert codes.codes_NQW.shape == (8 + 12, 5, probe.NUM_WORDS)
    fixed = probe.fit(host_model(48, 3, seed=1), tokenizer, sites_of(host_model(48, 3)), codes)
    assert {one.phi_in.shape[1] for one in fixed.values()} == {5}
