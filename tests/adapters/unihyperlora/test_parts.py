"""Quantisers, projectors and roles: each alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastpeft.adapters.unihyperlora.projectors import (
    Coordinate,
    codes_of,
    read_codes,
    spectral,
    write_codes,
)
from fastpeft.adapters.unihyperlora.quantise import (
    LEVELS,
    dequantise,
    pack_int4,
    quantise,
    straight_through,
    unpack_int4,
)
from fastpeft.adapters.unihyperlora.sites import find_sites, role_of
from fastpeft.errors import UserError
from tests.support.atom_hosts import host_model
from tests.support.tiny import causal_model, classifier_model

# ---- quantisers ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_what_was_dequantised_gives_the_same_bits(bits: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(200, 33, generator=draw) * torch.logspace(-30, 20, 200)[:, None]
    weight[3], weight[4, 1:] = 0, 0
    codes, scale = quantise(weight, bits)
    stood_for = dequantise(codes, scale)
    again, same_scale = quantise(stood_for, bits)
    assert torch.equal(again, codes)
    assert torch.equal(same_scale, scale)
    assert torch.equal(dequantise(again, same_scale), stood_for)
    assert int(codes.abs().max()) == LEVELS[bits]
    assert torch.equal(stood_for[3], torch.zeros(33))
    error = (stood_for - weight).abs().amax(1)
    assert bool((error <= 0.51 * scale).all())


@pytest.mark.parametrize("size", [(7, 5), (4, 4)])
def test_packed_codes_come_back_and_take_half_a_byte(size: tuple[int, int], seed: int) -> None:
    codes = torch.randint(-7, 8, size, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_int4(codes)
    assert packed.nbytes == (codes.numel() + 1) // 2
    assert torch.equal(unpack_int4(packed, size), codes)
    packed[-1] = 0  # -8, which no code is
    with pytest.raises(ValueError, match="beyond -7 to 7"):
        unpack_int4(packed, size)


def test_the_gradient_passes_as_if_nothing_was_rounded(seed: int) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    y = straight_through(weight, 4)
    assert not torch.equal(y, weight)
    y.backward(torch.arange(24.0).view(4, 6))
    assert torch.equal(weight.grad, torch.arange(24.0).view(4, 6))


# ---- projectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [96, 312, 384, 768, 1024, 4096])
def test_the_coordinate_projector_has_any_width_and_no_new_parameter(width: int) -> None:
    projector = Coordinate(16)
    phi = projector(width)
    assert phi.shape == (width, 16)
    torch.testing.assert_close(phi.norm(dim=0), torch.ones(16))
    assert int(torch.linalg.matrix_rank(phi.detach().double(), rtol=1e-4)) == 16
    assert sum(p.numel() for p in projector.parameters()) == 32 * 3 + 16 * 32


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_the_spectral_projector_has_the_leading_singular_vectors(shape: tuple[int, int], seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = spectral(weight, 6)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    for got, want in ((found.phi_out, left[:, :6]), (found.phi_in, right[:6].t())):
        torch.testing.assert_close((got.double().t() @ want).abs(), torch.eye(6).double(), rtol=0, atol=1e-5)
    seen = found.phi_out.t() @ weight @ found.phi_in
    torch.testing.assert_close(seen.double(), torch.diag(values[:6]), rtol=0, atol=1e-4)
    peak = found.phi_in.gather(0, found.phi_in.abs().argmax(0, keepdim=True))
    assert bool((peak > 0).all())
    with pytest.raises(ValueError, match="no 41 singular vectors"):
        spectral(weight, 41)


def test_the_probe_finds_in_another_basis_what_the_codes_are_of(seed: int) -> None:
    """A host whose activations are a rotation of the source's, and wider: the codes are read from it all the same."""
    draw = torch.Generator().manual_seed(seed)
    latent = torch.randn(200, 8, generator=draw)
    source = latent @ torch.randn(8, 40, generator=draw) + 3.0
    target = latent @ torch.randn(8, 96, generator=draw) - 1.0
    codes = codes_of(source, 6)
    torch.testing.assert_close(codes.var(0, correction=0), torch.ones(6), rtol=1e-3, atol=0)
    for host in (source, target):
        phi, offset = read_codes(host, codes)
        assert phi.shape == (host.shape[1], 6)
        assert float((host @ phi + offset - codes).norm()) <= 0.2 * float(codes.norm())
        out = write_codes(host, codes)
        torch.testing.assert_close(out.norm(dim=0), torch.ones(6))
        moved = torch.cosine_similarity((host - host.mean(0)) @ out, codes * host.std(), dim=0)
        assert bool((moved > 0.3).all())


# ---- roles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "llama", "qwen3"])
def test_every_family_has_the_same_roles(family: str) -> None:
    is_causal = family in ("llama", "qwen3")
    model = causal_model(family) if is_causal else classifier_model(family)
    head = [name for name, _ in model.named_children() if name in ("classifier", "pooler", "pre_classifier")]
    notes: list[str] = []
    sites = find_sites(model, head, "all-linear", notes)
    gate = ["gate"] if is_causal else []
    assert [site.role for site in sites] == ["query", "key", "value", "output", *gate, "up", "down"] * 2
    assert [site.type for site in sites] == [0, 1, 2, 3, *[4] * len(gate), 4, 4] * 2
    assert {site.depth for site in sites} == {0.0, 1.0}
    assert len({site.reads for site in sites}) == 4
    assert notes == []
    for site in sites:
        weight = model.get_submodule(site.name).weight
        assert (site.num_out, site.num_in) == tuple(weight.shape)


def test_a_projection_without_a_role_is_left_out_and_said() -> None:
    model = host_model()
    model.bert.encoder.layer[0].extra = nn.Linear(4, 4)
    notes: list[str] = []
    assert len(find_sites(model, ["classifier"], "all-linear", notes)) == 12
    assert notes == ["extra: not adapted, since their role in a layer is not known"]


def test_an_unknown_architecture_is_told_what_was_looked_for() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"mix": nn.Linear(4, 4)}) for _ in range(2)])
    with pytest.raises(UserError) as error:
        find_sites(nn.ModuleDict({"net": model}), [], "all-linear", [])
    assert "none of its linear layers (mix)" in str(error.value)
    assert "query: query, query_proj, q_proj" in str(error.value)
    assert "intermediate.dense" in str(error.value)
    assert error.value.exit_code == 2


def test_names_that_only_look_alike_have_no_role() -> None:
    assert role_of("a.layer.0.attention.self.query") == "query"
    assert role_of("a.layer.0.attention.output.dense") == "output"
    assert role_of("a.layer.0.output.dense") == "down"
    assert role_of("a.layer.0.attention.self.query_key_value") is None
