"""The Executor protocol and what starting one tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from lmdeploy.config.encoder import Pooling
from lmdeploy.engine.plan import PictureRoom, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the started device side can hold: facts that are derived, never configured.

    ``num_blocks`` counts usable blocks; block 0 is the null block and not among them: usable ids are
    ``1 .. num_blocks``. With ``pooling`` the model is an encoder: requests are whole texts that become one vector each,
    and there are no blocks.
    """

    num_blocks: int
    block_size: int
    max_batch_size: int  # slots
    max_step_tokens: int  # query tokens of one step
    session_len: int
    vocab_size: int
    kv_bytes: int = 0
    device: str = 'cpu'
    choices: dict[str, str] = field(default_factory=dict)  # 'attention' -> 'cpu_spans', ..., for the start line
    pooling: Pooling | None = None
    pictures: PictureRoom | None = None  # None: it reads no pictures


class StepHandle(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step and return its result; raises what the step raised."""
        ...


class Executor(Protocol):
    """Runs plans on every rank, in the order in which they were launched."""

    def start(self) -> Capacity:
        """Load the weights, allocate the cache, and say what there is."""
        ...

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step; returns without waiting where the device allows it."""
        ...

    def call(self, name: str, *args: Any) -> list[Any]:
        """Call a method of every rank's worker, between steps; one result per rank."""
        ...

    def stop(self) -> None:
        """Release everything; safe to call twice."""
        ...
