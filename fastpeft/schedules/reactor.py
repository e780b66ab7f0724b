"""REACTOR, a learning rate set by a policy that is trained by policy gradient while the model trains.

The papers that name it give no equations. This is the project's reconstruction: REINFORCE (Williams 1992) with a
Gaussian policy over the change of log lr. State: the slope of the loss, the log gradient norm, the remaining budget and
the mean entropy of the labelled tokens. Reward: the decrease of the loss per second over k = 8 steps. Baseline: the
running mean of the rewards.

The reward of a change is the mean loss of the k steps before it minus that of the k steps after it, divided by k times
the median seconds of a step. The median excludes evaluations inside the window. The scale of rewards depends on the
model and the machine, so that the distance from the baseline is divided by the running standard deviation.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from fastpeft.config.schedules import ReactorConfig, ScheduleConfig
from fastpeft.schedules.running import LARGEST, RunningMean
from fastpeft.schedules.schedule import WarmedSchedule
from fastpeft.signals import Blocks, Measured, Need, Rates

MOST_DEVIATIONS = 3.0
LOG_WINDOWS = 4
"""Windows per log event."""
STATE = ("bias", "loss_slope", "log_grad_norm", "budget_left", "entropy")


class Standardised:
    """Distance from the running mean in running standard deviations, at most MOST_DEVIATIONS. The mean excludes the
    current value; the standard deviation includes it."""

    def __init__(self, decay: float) -> None:
        self._mean, self._variance = RunningMean(decay), RunningMean(decay)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """0 for the first value and for values that are not finite."""
        before = np.nan_to_num(self._mean.value) if self._mean.value is not None else np.zeros_like(values)
        known = np.isfinite(self._mean.value) if self._mean.value is not None else np.zeros(values.shape, bool)
        good = np.abs(values) <= math.sqrt(LARGEST)
        distance = np.where(good & known, values - before, 0.0)
        self._mean.update(np.where(good, values, np.nan))
        self._variance.update(np.where(good & known, distance**2, np.nan))
        assert self._variance.value is not None
        spread = np.maximum(np.sqrt(np.nan_to_num(self._variance.value)), 1e-9 * np.abs(before) + 1e-300)
        return np.clip(distance / spread, -MOST_DEVIATIONS, MOST_DEVIATIONS)

    @property
    def mean(self) -> np.ndarray | None:
        return self._mean.value

    def state(self) -> list[Any]:
        return [self._mean.state(), self._variance.state()]

    def load_state(self, state: list[Any]) -> None:
        self._mean.load_state(state[0])
        self._variance.load_state(state[1])


class GaussianPolicy:
    """Actions sigma (w . x + z), z ~ N(0, 1). The weights w follow the score z x times the action's advantage."""

    def __init__(self, num_features: int, options: ReactorConfig, seed: int) -> None:
        self.options, self.seed = options, seed
        self.weights = np.zeros(num_features)
        self.num_actions = 0
        self._standardised = Standardised(options.baseline_decay)
        self._taken: tuple[np.ndarray, float] | None = None

    def mean(self, features: np.ndarray) -> float:
        return self.options.sigma * float(self.weights @ features)

    def act(self, features: np.ndarray) -> float:
        """Draw action number `num_actions` of the seed."""
        z = float(np.random.default_rng([self.seed, self.num_actions]).standard_normal())
        self.num_actions += 1
        self._taken = features, z
        return self.mean(features) + self.options.sigma * z

    def learn(self, reward: float) -> None:
        """Update the weights from the reward of the last action."""
        assert self._taken is not None
        features, z = self._taken
        self._taken = None
        advantage = float(self._standardised(np.array(reward)))
        self.weights = self.weights + self.options.policy_learning_rate * advantage * z * features

    @property
    def baseline(self) -> float | None:
        mean = self._standardised.mean
        return None if mean is None or np.isnan(mean) else float(mean)

    def state(self) -> dict[str, Any]:
        return {
            "weights": self.weights.tolist(),
            "num_actions": self.num_actions,
            "rewards": self._standardised.state(),
            "taken": None if self._taken is None else [self._taken[0].tolist(), self._taken[1]],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.weights, self.num_actions = np.array(state["weights"]), state["num_actions"]
        self._standardised.load_state(state["rewards"])
        taken = state["taken"]
        self._taken = None if taken is None else (np.array(taken[0]), taken[1])


@dataclass
class Step:
    """Measurements of one step in a window. `entropy` is None if it was not measured."""

    loss: float
    grad_norm: float
    entropy: float | None
    elapsed_s: float


class Reactor(WarmedSchedule):
    own: ReactorConfig

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        super().__init__(config, peak_lr, blocks, **more)
        options = self.own
        self.policy = GaussianPolicy(len(STATE), options, self.seed)
        self.log_ratio = 0.0
        """Logarithm of the learning rate divided by its peak."""
        self._standardised = Standardised(options.baseline_decay)
        self._window: list[Step] = []
        self._loss_before: float | None = None
        """Mean loss of the previous window."""
        self._change: float | None = None
        self._rewards: list[float] = []
        """Rewards since the last log event."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.LOSS, Need.TOKENS})

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        was_warm = self.warmup.ended_at is not None
        warm = self.warmup_factor(progress)
        if was_warm and measured is not None and not measured.skipped:
            self._take_in(measured)
            if len(self._window) == self.own.window:
                self._end_window(progress)
        return Rates(self.peak_lr * warm * math.exp(self.log_ratio))

    def _take_in(self, measured: Measured) -> None:
        if abs(measured.loss) <= LARGEST and 0 < measured.grad_norm <= LARGEST and abs(measured.elapsed_s) <= LARGEST:
            entropy = measured.entropy
            if entropy is not None and not abs(entropy) <= LARGEST:
                entropy = None
            self._window.append(Step(measured.loss, measured.grad_norm, entropy, measured.elapsed_s))

    def _end_window(self, progress: float) -> None:
        """Reward the last change of the learning rate, and draw the next one."""
        loss = fmean(step.loss for step in self._window)
        step_s = median(b.elapsed_s - a.elapsed_s for a, b in zip(self._window, self._window[1:]))
        if self._loss_before is not None and self._change is not None and step_s > 0:
            reward = (self._loss_before - loss) / (step_s * len(self._window))
            if abs(reward) <= LARGEST:
                self.policy.learn(reward)
                self._rewards.append(reward)
        features = self._features(progress)
        self._change = self.policy.act(features)
        limit = math.log(self.own.most)
        self.log_ratio = min(max(self.log_ratio + self._change, -limit), limit)
        self._loss_before = loss
        self._window = []
        if len(self._rewards) == LOG_WINDOWS:
            self._tell(features)

    def _features(self, progress: float) -> np.ndarray:
        """The features named in STATE; measured ones are standardised."""
        steps, num_steps = self._window, len(self._window)
        times = np.arange(num_steps) - (num_steps - 1) / 2
        slope = float(times @ np.array([step.loss for step in steps]) / (times @ times))
        log_norm = fmean(math.log(step.grad_norm) for step in steps)
        entropies = [step.entropy for step in steps if step.entropy is not None]
        entropy = fmean(entropies) if entropies else math.nan
        slope, log_norm, entropy = self._standardised(np.array([slope, log_norm, entropy]))
        return np.array([1.0, slope, log_norm, min(max(1 - progress, 0.0), 1.0), entropy])

    def _tell(self, features: np.ndarray) -> None:
        self.tell(
            "schedule",
            rewards=self._rewards,
            baseline=self.policy.baseline,
            mean_change=self.policy.mean(features),
            lr=self.peak_lr * math.exp(self.log_ratio),
            policy=dict(zip(STATE, self.policy.weights.tolist())),
        )
        self._rewards = []

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "policy": self.policy.state(),
            "log_ratio": self.log_ratio,
            "standardised": self._standardised.state(),
            "window": [astuple(step) for step in self._window],
            "loss_before": self._loss_before,
            "change": self._change,
            "rewards": list(self._rewards),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.policy.load_state(state["policy"])
        self._standardised.load_state(state["standardised"])
        self._window = [Step(*values) for values in state["window"]]
        self.log_ratio, self._loss_before = state["log_ratio"], state["loss_before"]
        self._change, self._rewards = state["change"], list(state["rewards"])
