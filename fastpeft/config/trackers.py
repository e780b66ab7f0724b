"""The family of trackers. A run has any number of them, each enabled by its own section.

That section is a switch, or a Config with a property `enabled`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastpeft.config.fields import STRICT_KEYS
from fastpeft.config.registry import Entry, Registry


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    __pydantic_config__ = STRICT_KEYS

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if an API key is present, else offline; always off in trial mode. WANDB_MODE and WANDB_DISABLED can
    restrict it further."""
    project: str | None = None
    """When absent, WANDB_PROJECT, else fastpeft. W&B reads entity, group, tags and notes from its own variables:
    WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES."""

    TRIAL: ClassVar[dict[str, Any]] = {"mode": "disabled"}

    @property
    def enabled(self) -> bool:
        return self.mode != "disabled"


@dataclass(frozen=True, kw_only=True)
class TrackerEntry(Entry):
    title: str
    """Name in messages."""


TRACKERS: Registry[TrackerEntry] = Registry(
    "tracker",
    "",
    [
        TrackerEntry(name="wandb", title="W&B", target="fastpeft.trackers.wandb_run:WandbRun", config=WandbConfig),
        TrackerEntry(
            name="tensorboard",
            title="TensorBoard",
            target="fastpeft.trackers.tensorboard:TensorBoardRun",
            default=False,
            doc="Write the run for TensorBoard, into its folder; needs the package tensorboard.",
        ),
    ],
)
