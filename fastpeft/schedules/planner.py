"""GRAFF's planner: a recurrent graph network of 6,144 weights, its hand-written gradient, its optimizer and its file.

It is written in NumPy, because at this size a step of torch's autograd costs milliseconds, mostly overhead. It uses
fp64, so that a checkpoint in JSON is exact.

Shape suffixes: K blocks (nodes), F features, D state, M message, G gates x state, P weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fastpeft.errors import UserError, first_line
from fastpeft.signals import Blocks

NUM_FEATURES, STATE, MESSAGE = 3, 16, 64
ETA, MULTIPLIER = range(2)
"""Rows of the decoder."""
SHAPES = {
    "feature.weight": (STATE, NUM_FEATURES),
    "feature.bias": (STATE,),
    "message.own": (MESSAGE, STATE),
    "message.neighbours": (MESSAGE, STATE),
    "message.bias": (MESSAGE,),
    "gru.weight_ih": (3 * STATE, MESSAGE),
    "gru.weight_hh": (3 * STATE, STATE),
    "gru.bias_ih": (3 * STATE,),
    "gru.bias_hh": (3 * STATE,),
    "decoder.weight": (2, STATE),
}
_ENDS = list(accumulate(math.prod(shape) for shape in SHAPES.values()))
NUM_WEIGHTS = _ENDS[-1]
_PLACES = [(name, slice(end - math.prod(shape), end), shape) for (name, shape), end in zip(SHAPES.items(), _ENDS)]
_DECODER = next(place for name, place, _ in _PLACES if name == "decoder.weight")
MIN_MULTIPLIER = 1e-6
"""Lower limit of a multiplier before centring."""
MIN_SQUARE = 0.01
"""Lower limit of ||h||^2 in a projection."""
SHIPPED = Path(__file__).with_name("planner.safetensors")
"""The warm start shipped with the package."""


def views(weights_P: np.ndarray) -> dict[str, np.ndarray]:
    """Views of the tensors in the vector of all weights."""
    return {name: weights_P[place].reshape(shape) for name, place, shape in _PLACES}


def decoder_row(weights_P: np.ndarray, row: int) -> np.ndarray:
    """(D,) view of the decoder's row ETA or MULTIPLIER."""
    start = _DECODER.start + row * STATE
    return weights_P[start : start + STATE]


def initial_weights(seed: int = 0) -> np.ndarray:
    """Uniform in +-1/sqrt(inputs), as torch's Linear and GRUCell; the decoder is 0 and changes no learning rate."""
    random = np.random.default_rng(seed)
    inputs = {"feature": NUM_FEATURES, "message": 2 * STATE, "gru": STATE}
    weights_P = np.zeros(NUM_WEIGHTS)
    for name, tensor in views(weights_P).items():
        layer = name.partition(".")[0]
        if layer in inputs:
            bound = 1 / math.sqrt(inputs[layer])
            tensor[:] = random.uniform(-bound, bound, tensor.shape)
    return weights_P


def adjacency(blocks: Blocks) -> np.ndarray:
    """(K, K); row i holds the weights of the mean over the incoming edges of block i.

    Edges come from blocks of the same layer, the same projection in the adjacent adapted layers, and the block itself.
    """
    place = {layer: i for i, layer in enumerate(sorted(set(blocks.layers)))}
    layer_K = np.array([place[layer] for layer in blocks.layers])
    projection_K = np.unique(np.array(blocks.projections), return_inverse=True)[1]
    gap_KK = np.abs(layer_K[:, None] - layer_K)
    edges_KK = (gap_KK == 0) | ((gap_KK == 1) & (projection_K[:, None] == projection_K))
    return edges_KK / edges_KK.sum(1, keepdims=True)


@dataclass(frozen=True)
class _Pass:
    """Intermediate values of one message passing round, saved for its gradient."""

    h_KD: np.ndarray
    z_KD: np.ndarray
    mean_KD: np.ndarray
    message_KM: np.ndarray
    reset_KD: np.ndarray
    update_KD: np.ndarray
    new_KD: np.ndarray
    hidden_new_KD: np.ndarray


class Tape:
    """One forward pass of the planner, with the values that its gradient needs.

    The mean of the messages Linear([z_i, z_j]) over the edges into i is linear in the mean of z_j, so that nothing is
    computed per edge.
    """

    def __init__(
        self,
        weights_P: np.ndarray,
        adjacency_KK: np.ndarray | None,
        h_KD: np.ndarray,
        features_KF: np.ndarray,
        layers: int = 1,
        centred: bool = False,
    ) -> None:
        """
        Args:
            adjacency_KK: None for no graph: each block is its only neighbour.
            h_KD: states from the previous step.
            layers: number of message passing rounds.
            centred: divide the multipliers by their geometric mean.
        """
        self.weights_P, self.adjacency_KK = weights_P, adjacency_KK
        self.h_KD, self.features_KF, self.centred = h_KD, features_KF, centred
        w = self._w = views(weights_P)
        self._passes: list[_Pass] = []
        self._input_KD = features_KF @ w["feature.weight"].T + w["feature.bias"]
        for _ in range(layers):
            h_KD = self._pass(h_KD)
        self.out_KD = h_KD
        self.mean_D = h_KD.mean(0)
        self._raw_K = self.multiplier_K = 2 * _sigmoid(h_KD @ w["decoder.weight"][MULTIPLIER])
        if centred:
            log_K = np.log(np.maximum(self._raw_K, MIN_MULTIPLIER))
            self.multiplier_K = np.exp(log_K - log_K.mean())

    def _pass(self, h_KD: np.ndarray) -> np.ndarray:
        """One round of messages between the states plus features, then one GRUCell."""
        w, z_KD = self._w, h_KD + self._input_KD
        mean_KD = z_KD if self.adjacency_KK is None else self.adjacency_KK @ z_KD
        message_KM = z_KD @ w["message.own"].T + mean_KD @ w["message.neighbours"].T + w["message.bias"]
        in_KG = message_KM @ w["gru.weight_ih"].T + w["gru.bias_ih"]
        hidden_KG = h_KD @ w["gru.weight_hh"].T + w["gru.bias_hh"]
        gates_KG = _sigmoid(in_KG[:, : 2 * STATE] + hidden_KG[:, : 2 * STATE])
        reset_KD, update_KD = gates_KG[:, :STATE], gates_KG[:, STATE:]
        hidden_new_KD = hidden_KG[:, 2 * STATE :]
        new_KD = np.tanh(in_KG[:, 2 * STATE :] + reset_KD * hidden_new_KD)
        self._passes.append(_Pass(h_KD, z_KD, mean_KD, message_KM, reset_KD, update_KD, new_KD, hidden_new_KD))
        return new_KD + update_KD * (h_KD - new_KD)

    def use(self, weights_P: np.ndarray) -> None:
        """Set the weights that the learning rate was computed with, after a projection moved the decoder's row."""
        self.weights_P, self._w = weights_P, views(weights_P)

    def gradient(self, d_log_eta: float, d_log_m_K: np.ndarray) -> np.ndarray:
        """(P,) gradient of a loss by the weights, from its derivatives by log eta and by the log of each multiplier.

        The incoming states are constants: backpropagation through time is truncated at every step.
        """
        w, out_P = self._w, np.zeros(NUM_WEIGHTS)
        d = views(out_P)
        decoder = w["decoder.weight"]
        if self.centred:
            d_log_m_K = d_log_m_K - d_log_m_K.mean()
        d_logit_K = d_log_m_K * (1 - self._raw_K / 2)
        d["decoder.weight"][ETA] = d_log_eta * self.mean_D
        d["decoder.weight"][MULTIPLIER] = d_logit_K @ self.out_KD
        d_KD = np.multiply.outer(d_logit_K, decoder[MULTIPLIER]) + decoder[ETA] * (d_log_eta / len(self.out_KD))
        for saved in reversed(self._passes):
            d_KD = self._pass_gradient(saved, d_KD, d)
        return out_P

    def _pass_gradient(self, saved: _Pass, d_KD: np.ndarray, d: dict[str, np.ndarray]) -> np.ndarray:
        """Add to the gradients `d` of the weights; returns the gradient by the incoming states."""
        w = self._w
        d_new_KD = d_KD * (1 - saved.update_KD) * (1 - saved.new_KD**2)
        d_reset_KD = d_new_KD * saved.hidden_new_KD * saved.reset_KD * (1 - saved.reset_KD)
        d_update_KD = d_KD * (saved.h_KD - saved.new_KD) * saved.update_KD * (1 - saved.update_KD)
        d_in_KG = np.concatenate([d_reset_KD, d_update_KD, d_new_KD], axis=1)
        d_hidden_KG = np.concatenate([d_reset_KD, d_update_KD, d_new_KD * saved.reset_KD], axis=1)
        d_message_KM = d_in_KG @ w["gru.weight_ih"]
        d_mean_KD = d_message_KM @ w["message.neighbours"]
        if self.adjacency_KK is not None:
            d_mean_KD = self.adjacency_KK.T @ d_mean_KD
        d["gru.weight_ih"] += d_in_KG.T @ saved.message_KM
        d["gru.bias_ih"] += d_in_KG.sum(0)
        d["gru.weight_hh"] += d_hidden_KG.T @ saved.h_KD
        d["gru.bias_hh"] += d_hidden_KG.sum(0)
        d["message.own"] += d_message_KM.T @ saved.z_KD
        d["message.neighbours"] += d_message_KM.T @ saved.mean_KD
        d["message.bias"] += d_message_KM.sum(0)
        d_z_KD = d_message_KM @ w["message.own"] + d_mean_KD
        d["feature.weight"] += d_z_KD.T @ self.features_KF
        d["feature.bias"] += d_z_KD.sum(0)
        return d_KD * saved.update_KD + d_hidden_KG @ w["gru.weight_hh"] + d_z_KD


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def project(row_D: np.ndarray, mean_D: np.ndarray, low: float, high: float) -> np.ndarray:
    """The row nearest to `row_D` whose product with `mean_D` lies in [low, high]: a projection onto a half space.

    If the states are almost zero the projection is incomplete, so that the row stays bounded.
    """
    value = float(row_D @ mean_D)
    excess = value - min(max(value, low), high)
    return row_D - excess / max(float(mean_D @ mean_D), MIN_SQUARE) * mean_D if excess else row_D


class Adam:
    """Adam (arXiv:1412.6980) on one vector, with its gradient clipped by norm."""

    BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

    def __init__(self, size: int, learning_rate: float, max_norm: float) -> None:
        self.learning_rate, self.max_norm = learning_rate, max_norm
        self.count = 0
        self._first, self._second = np.zeros(size), np.zeros(size)

    def step(self, weights: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Returns new weights; the old array is not changed."""
        norm = float(np.linalg.norm(gradient))
        gradient = gradient * min(1.0, self.max_norm / norm) if norm > 0 else gradient
        self.count += 1
        self._first = self.BETA1 * self._first + (1 - self.BETA1) * gradient
        self._second = self.BETA2 * self._second + (1 - self.BETA2) * gradient**2
        root = np.sqrt(self._second / (1 - self.BETA2**self.count)) + self.EPS
        return weights - self.learning_rate / (1 - self.BETA1**self.count) * self._first / root

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "first": self._first.tolist(), "second": self._second.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self._first, self._second = (np.array(state[name], dtype=np.float64) for name in ("first", "second"))


def save_weights(path: str | Path, weights_P: np.ndarray) -> None:
    """Write a planner's weights as safetensors."""
    save_file({name: tensor.copy() for name, tensor in views(weights_P).items()}, path)


def load_weights(path: str | Path) -> np.ndarray:
    """(P,) weights from a file of `save_weights`, in fp32 or fp64.

    Raises:
        UserError: the file is missing or not a planner's.
    """

    def refuse(what: str) -> UserError:
        return UserError(f"schedule.graff.warm_start: {path}: {what}")

    if not Path(path).is_file():
        raise refuse("there is no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise refuse(f"not a safetensors file ({first_line(error)})") from None
    if set(tensors) != set(SHAPES):
        odd = sorted(set(tensors) ^ set(SHAPES))
        raise refuse(
            f"not a planner's weights: {', '.join(odd[:4])} {'is' if len(odd) == 1 else 'are'} missing or extra"
        )
    weights_P = np.zeros(NUM_WEIGHTS)
    for name, place in views(weights_P).items():
        tensor = tensors[name]
        if tensor.shape != place.shape or tensor.dtype not in (np.float32, np.float64):
            raise refuse(f"{name} is {tensor.dtype} of shape {tensor.shape}; expected float32 of shape {place.shape}")
        if not np.isfinite(tensor).all():
            raise refuse(f"{name} holds numbers that are not finite")
        place[:] = tensor
    return weights_P
