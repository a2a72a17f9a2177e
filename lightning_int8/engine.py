"""What the Lightning and the Fabric plugin share: one conversion, the work after each step, the saved state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_int8 import checkpoint
from lightning_int8.clock import Clock
from lightning_int8.contraction import LayerState
from lightning_int8.policies import BitWidthRule, DeviationFactor
from lightning_int8.report import ConversionReport, current, execution_table
from lightning_int8.rewrite import Conversion, conversion_of, convert_with, layer_states
from lightning_int8.settings import Settings
from lightning_int8.steering import Steering
from lightning_int8.sync import SYNC_CLIP, agree, of_first_rank, several_ranks

HIGH_PRECISION = ("32-true", "bf16-mixed", "16-mixed")
"""What the layers that stay in float, and everything between layers, compute in."""


class Engine:
    """Converts one model and steers it while it trains.

    Args:
        settings: Arguments of the conversion.
        sync_clip: How ranks agree on clip values after a refresh: "max", "mean", or "local" for not at all. On
            learning-rate factors and on the layers kept in float they always agree.

    Attributes:
        optimizers: Number of optimizers that may take turns.
    """

    def __init__(self, settings: Settings, sync_clip: str = "max") -> None:
        if sync_clip not in SYNC_CLIP:
            raise ValueError(f"sync_clip: {sync_clip!r} is not one of {', '.join(SYNC_CLIP)}")
        self.settings = settings
        self.sync_clip = sync_clip
        self.optimizers = 1
        self._conversion: Conversion | None = None
        self._states: list[LayerState] = []
        self._seen_steps = 0
        self._summarised_steps = 0
        self._loss_scale: float | None = None
        self._learning_rate: DeviationFactor | None = None
        self._bit_width: BitWidthRule | None = None
        self._monitor_every: int | None = None
        self._warned = False

    def configure(
        self,
        learning_rate: DeviationFactor | None = None,
        bit_width: BitWidthRule | None = None,
        monitor_every: int | None = None,
    ) -> None:
        """Put rules in place of the recipe's, for all layers; None leaves what there is.

        Args:
            learning_rate: Rule of the per-layer learning-rate factors.
            bit_width: Rule that adapts the widths.
            monitor_every: Optimizer steps between measurements of the quantization error of every operand.
        """
        self._learning_rate = learning_rate or self._learning_rate
        self._bit_width = bit_width or self._bit_width
        self._monitor_every = monitor_every or self._monitor_every
        for state in self._states:
            if self._learning_rate is not None:
                state.scale_learning_rate(self._learning_rate)
            if self._bit_width is not None:
                state.adapt_widths(self._bit_width)
        if self._conversion is not None:
            self.clock.monitor_every = self._monitor_every

    def convert(self, model: nn.Module) -> None:
        """Convert ``model``, once; later calls with the same model change nothing."""
        _refuse_sharded(model)
        convert_with(model, self.settings)
        conversion = conversion_of(model)
        self._states = layer_states(model)
        if conversion is not self._conversion:
            self._conversion = conversion
            self._seen_steps = self._summarised_steps = self.clock.steps
        self.configure()

    @property
    def states(self) -> list[LayerState]:
        """States of the converted layers, in the order of the model."""
        return self._states

    @property
    def steering(self) -> Steering:
        """What acts between steps."""
        assert self._conversion is not None, "no model has been converted"
        return self._conversion.steering

    @property
    def clock(self) -> Clock:
        """Optimizer steps of the model."""
        assert self._conversion is not None, "no model has been converted"
        return self._conversion.clock

    def report(self, model: nn.Module) -> ConversionReport:
        """The decisions, with routes on the device where the model now lies."""
        assert self._conversion is not None, "no model has been converted"
        return current(self._conversion.report, model)

    def check_optimizers(self, optimizers: Sequence[Any]) -> None:
        """Warn once if the recipe is meant for another optimizer than those in use."""
        wanted = self.settings.recipe.optimizer
        others = {type(o).__name__ for o in optimizers} - {wanted}
        if wanted and others and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"recipe {self.settings.recipe.name!r} is meant for {wanted}, whose momentum and update are quantized "
                f"too; with {', '.join(sorted(others))} the update of the weights is a float one"
            )

    def set_rank(self, rank: int) -> None:
        """Give this process its own rounding noise."""
        for state in self._states:
            for operand in state.distinct_operands():
                operand.key[1] = rank

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around a call of the optimizer: what it settles waits for ``after_step``, where ranks agree first."""
        self.steering.settles_itself = False
        try:
            yield
        finally:
            self.steering.settles_itself = True

    def after_step(self, loss_scale: float) -> None:
        """Work after an optimizer step: prove that INT8 ran, follow the loss scale, agree with other ranks, settle.

        Args:
            loss_scale: Factor of ``GradScaler`` in force from now on, 1 without one.

        Raises:
            RuntimeError: A converted layer trained without a contraction.
        """
        self.follow_loss_scale(loss_scale)
        if self.clock.steps == self._seen_steps:
            return  # the optimizer was not called: a skipped step under GradScaler
        # More than one, where an optimizer wraps another or steps behind the plugin's back.
        finished, self._seen_steps = range(self._seen_steps, self.clock.steps), self.clock.steps
        for state in self._states:
            if state.train_calls and not state.counts.of("output"):
                raise RuntimeError(
                    f"layer {state.name!r}: trained {state.train_calls} forward passes without one INT8 contraction; "
                    "something replaces what its forward calls"
                )
        agreed = not several_ranks() or self._agree(finished)
        before = {state.name for state in self._states if state.kept_float}
        self.steering.settle(agreed)
        for state in self._states:
            if state.kept_float and state.name not in before:
                rank_zero_info(f"layer {state.name!r} stays in float from now on: {state.kept_float}")

    def _agree(self, finished: range) -> bool:
        """Agree with the other ranks on what the finished steps may have measured.

        Returns:
            Whether they did: distances are the same on all ranks now. The answer is the same everywhere.
        """
        if self.steering.keep_float and self.clock.order is not None:
            self.clock.order = of_first_rank(self.clock.order)
        operands = [o for s in self._states for o in s.distinct_operands() if o.tensor != "w" or o.width]
        if self.sync_clip == "local":
            operands = [o for o in operands if o.tracks_distance]
            due = any(self.clock.last_due(None, step) == step for step in finished)
        else:
            # With several optimizers that take turns a layer may refresh as many steps after it was due.
            late = range(self.optimizers)
            due = any(o.refreshes_within(step, late) for o in operands for step in finished)
        if due and operands:
            agree(operands, self.sync_clip)
        return due

    def follow_loss_scale(self, loss_scale: float) -> None:
        """Gradients grow and shrink with the loss scale, and so must their clip values between refreshes."""
        if self._loss_scale is not None and loss_scale != self._loss_scale:
            for state in self._states:
                for operand in state.distinct_operands():
                    if operand.tensor == "g":
                        operand.rescale(loss_scale / self._loss_scale)
        self._loss_scale = loss_scale

    def summary(self) -> str | None:
        """Table of executed contractions; None if the optimizer made no step since the last one."""
        if self._conversion is None or self.clock.steps == self._summarised_steps:
            return None
        self._summarised_steps = self.clock.steps
        return execution_table(self._states)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in tensors and primitives; empty before the conversion."""
        if self._conversion is None:
            return {}
        return checkpoint.state_of(self.settings, self.clock, self._loss_scale, self._states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``. Everything is checked before anything changes.

        Raises:
            ValueError: The state is of another version or recipe, is truncated, or belongs to other layers; the
                message names the field.
        """
        self.check_state_dict(state)
        checkpoint.load(state, self.clock, self._states)
        self.configure()  # callbacks of this run have the last word
        self._seen_steps = self.clock.steps
        self._loss_scale = state["loss_scale"]
        self.steering.resumed()

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise the error of ``load_state_dict``, if any, and change nothing."""
        checkpoint.check(state, self.settings, self._states)


def _refuse_sharded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(c.__name__ in ("FullyShardedDataParallel", "FSDPModule") for c in type(module).__mro__):
            raise TypeError(
                f"module {name!r}: {type(module).__name__} cannot be converted; INT8 training works under DDP"
            )
