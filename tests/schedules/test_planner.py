"""The planner against torch: its forward pass, its derivative, its optimizer, its graph and its file.

Shape suffixes: K blocks, F features, D state.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fastpeft.errors import UserError
from fastpeft.kernels.ops.adamw.reference import AdamWOptions, adamw
from fastpeft.schedules import planner
from fastpeft.schedules.planner import NUM_FEATURES, NUM_WEIGHTS, STATE, Adam, Tape
from fastpeft.signals import Blocks
from tests.support.closed_loop import blocks_of

BLOCKS = blocks_of(3, ("q", "k", "v"))


def random_weights(random: np.random.Generator) -> np.ndarray:
    return planner.initial_weights(int(random.integers(2**31))) + 0.2 * random.normal(size=NUM_WEIGHTS)


def torch_planner(weights, edges_KK, h_KD, features_KF, layers):
    """(log eta - log eta_ref, log multipliers, states) with one message per edge and torch's own GRUCell."""
    w, cell = planner.views(weights), torch.nn.GRUCell(planner.MESSAGE, STATE).double()
    for _ in range(layers):
        z_KD = h_KD + features_KF @ w["feature.weight"].T + w["feature.bias"]
        linear = torch.cat([w["message.own"], w["message.neighbours"]], dim=1)
        incoming = []
        for i in range(len(z_KD)):
            ends = [torch.cat([z_KD[i], z_KD[j]]) for j in range(len(z_KD)) if edges_KK[i, j]]
            incoming.append(torch.stack([linear @ both + w["message.bias"] for both in ends]).mean(0))
        parameters = {name: w[f"gru.{name}"] for name, _ in cell.named_parameters()}
        h_KD = torch.func.functional_call(cell, parameters, (torch.stack(incoming), h_KD))
    eta_D, multiplier_D = w["decoder.weight"]
    m_K = 2 * torch.sigmoid(h_KD @ multiplier_D)
    return eta_D @ h_KD.mean(0), m_K.log(), h_KD


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("centred", [False, True])
def test_forward_and_derivative_are_torchs(graph, layers, centred, seed):
    random = np.random.default_rng(seed)
    weights_P, h_KD = random_weights(random), random.normal(size=(len(BLOCKS), STATE))
    features_KF = random.normal(size=(len(BLOCKS), NUM_FEATURES))
    adjacency_KK = planner.adjacency(BLOCKS) if graph else None
    edges_KK = adjacency_KK > 0 if graph else np.eye(len(BLOCKS)) > 0
    tape = Tape(weights_P, adjacency_KK, h_KD, features_KF, layers, centred)

    weights = torch.tensor(weights_P, requires_grad=True)
    log_eta, log_m_K, out_KD = torch_planner(weights, edges_KK, torch.tensor(h_KD), torch.tensor(features_KF), layers)
    if centred:
        log_m_K = log_m_K - log_m_K.mean()
    decoder = planner.views(weights_P)["decoder.weight"]
    np.testing.assert_allclose(tape.out_KD, out_KD.detach(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.log(tape.multiplier_K), log_m_K.detach(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(decoder[0] @ tape.mean_D, log_eta.item(), rtol=1e-10)

    d_log_eta, d_log_m_K = random.normal(), random.normal(size=len(BLOCKS))
    (d_log_eta * log_eta + torch.tensor(d_log_m_K) @ log_m_K).backward()
    np.testing.assert_allclose(tape.gradient(d_log_eta, d_log_m_K), weights.grad, rtol=1e-9, atol=1e-12)
    assert (weights.grad != 0).double().mean() > 0.99


def test_a_new_planner_changes_no_rate(seed):
    random = np.random.default_rng(seed)
    features_KF = random.normal(size=(len(BLOCKS), NUM_FEATURES))
    tape = Tape(planner.initial_weights(), planner.adjacency(BLOCKS), np.zeros((len(BLOCKS), STATE)), features_KF)
    assert (tape.multiplier_K == 1).all()
    assert np.linalg.norm(tape.mean_D) > 0.1  # something to decode
    d_P = tape.gradient(-1.0, np.zeros(len(BLOCKS)))
    assert np.linalg.norm(planner.views(d_P)["decoder.weight"][0]) > 0.1


def test_edges():
    """Layers 0, 2, 5 are next to each other: no other is adapted. One of them lacks a projection."""
    blocks = Blocks(
        names=tuple("abcde"), layers=(5, 0, 0, 2, 2), projections=("q", "q", "v", "q", "o"), num_elements=(1,) * 5
    )
    expected = [{0, 3}, {1, 2, 3}, {1, 2}, {0, 1, 3, 4}, {3, 4}]
    adjacency_KK = planner.adjacency(blocks)
    for row, edges in zip(adjacency_KK, expected):
        np.testing.assert_allclose(row, [(k in edges) / len(edges) for k in range(5)])


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_adam_is_the_optimizers_with_a_clipped_gradient(max_norm, seed):
    random = np.random.default_rng(seed)
    weights, adam = random.normal(size=20), Adam(20, 0.01, max_norm)
    theirs, first, second = torch.tensor(weights), torch.zeros(20).double(), torch.zeros(20).double()
    for step in range(1, 30):
        gradient = random.normal(size=20)
        clipped = torch.tensor(gradient * min(1.0, max_norm / np.linalg.norm(gradient)))
        count, rate, decay = torch.tensor(float(step)), torch.tensor(0.01, dtype=torch.float64), torch.tensor(0.0)
        theirs, first, second = adamw(theirs, clipped, first, second, count, rate, decay, AdamWOptions())
        before = weights.copy()
        after = adam.step(weights, gradient)
        np.testing.assert_array_equal(weights, before)
        weights = after
    np.testing.assert_allclose(weights, theirs, rtol=1e-9)


def test_weights_survive_their_file(tmp_path, seed):
    weights_P = random_weights(np.random.default_rng(seed))
    planner.save_weights(tmp_path / "p.safetensors", weights_P)
    np.testing.assert_array_equal(planner.load_weights(tmp_path / "p.safetensors"), weights_P)


def damaged(**changes):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in planner.SHAPES.items()} | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (damaged(**{"decoder.weight": None}), r"decoder\.weight is missing or extra"),
        (damaged(more=np.zeros(1)), "more is missing or extra"),
        (damaged(**{"gru.bias_hh": np.zeros(47)}), r"gru\.bias_hh is float64 of shape \(47,\); expected float32 of"),
        (damaged(**{"gru.bias_hh": np.zeros(48, np.int64)}), r"gru\.bias_hh is int64"),
        (damaged(**{"gru.bias_hh": np.full(48, np.inf)}), r"gru\.bias_hh holds numbers that are not finite"),
    ],
)
def test_a_file_that_is_no_planner_is_refused(tensors, message, tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"warm_start: .*bad\.safetensors: .*{message}"):
        planner.load_weights(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"{}" * 50])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(UserError, match=r"bad: not a safetensors file \(.+\)"):
        planner.load_weights(tmp_path / "bad")
    with pytest.raises(UserError, match="none: there is no such file"):
        planner.load_weights(tmp_path / "none")
    with pytest.raises(UserError, match="no such file"):
        planner.load_weights(tmp_path)
