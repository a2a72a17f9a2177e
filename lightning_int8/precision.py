"""``Int8Precision``: the plugin of the Lightning ``Trainer``. It converts once, then follows the optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_int8.contraction import LayerState
from lightning_int8.engine import HIGH_PRECISION, Engine
from lightning_int8.hosts import twin
from lightning_int8.policies import BitWidthRule, DeviationFactor
from lightning_int8.report import ConversionReport
from lightning_int8.settings import Settings
from lightning_int8.spec import Recipe

STATE_KEY = "Int8Precision"
"""Top-level key of the plugin's state in a Lightning checkpoint."""

_ENGINE = "int8"


class Int8Precision(MixedPrecision, *twin("pytorch_lightning", "plugins.precision", "Precision")):  # type: ignore[misc]
    """Lightning precision plugin: matrix products of the forward and the backward pass in 8-bit integers.

    ``Trainer(plugins=[Int8Precision()])``. The model is converted in place before it is moved to its device; weights,
    names and ``state_dict`` keys stay as they are, so checkpoints load into the float model and back.

    Args:
        recipe: A name (``lightning_int8.recipes.names()``), a ``Recipe``, or the path of a YAML recipe.
        skip: Names or globs of layers, or of modules that contain them, to keep in float.
        layers: "int8" converts every layer that can be; "auto" takes back, after the first training step, those that
            are faster in float on this machine. DDP ranks agree, and a resumed run keeps what was decided.
        high_precision: What the rest computes in: "32-true", "bf16-mixed" or "16-mixed" (with a gradient scaler).
        backend: "auto" chooses by the device; or the name of one.
        sync_clip: How DDP ranks agree on clip values after a refresh: "max", "mean" or "local". Learning-rate factors
            and the layers that a recipe keeps in float are the same on all ranks in any case.
        refresh: Optimizer steps between refreshes of clip values whose range rule names no interval.
        fuse: Whether batch norm, ReLU, addition and max pooling between convolutions are computed while their result is
            quantized, on the CPU; see ``docs/fusion.md``.
        seed: Seed of stochastic rounding.

    Raises:
        ValueError: An argument out of its range; the message names field and value.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[Int8Precision(skip=("head",))], logger=False, enable_checkpointing=False)
        >>> trainer.precision
        '32-true'
    """

    def __init__(
        self,
        recipe: str = "default",
        skip: str | Sequence[str] = (),
        layers: Literal["int8", "auto"] = "int8",
        high_precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
        backend: Literal["auto", "reference", "onednn", "cupy"] = "auto",
        sync_clip: Literal["max", "mean", "local"] = "max",
        refresh: int = 100,
        fuse: bool = True,
        seed: int = 0,
    ) -> None:
        if high_precision not in HIGH_PRECISION:
            raise ValueError(f"high_precision: {high_precision!r} is not one of {', '.join(HIGH_PRECISION)}")
        settings = Settings.make(recipe, skip, layers=layers, backend=backend, fuse=fuse, seed=seed, refresh=refresh)
        # Scaler and autocast device are known in `connect` only; until then the parent has the mode without a scaler.
        super().__init__("bf16-mixed", device="cpu")
        self.precision = high_precision
        self.scaler: torch.amp.GradScaler | None = None
        self._engine = Engine(settings, sync_clip)
        self._model: nn.Module | None = None

    @property
    def report(self) -> ConversionReport | None:
        """The decision for each layer as things stand; None before the model has been converted."""
        return None if self._model is None else self._engine.report(self._model)

    @property
    def layers(self) -> list[LayerState]:
        """What each converted layer remembers: clip values, widths, factor, counts; empty before the conversion."""
        return self._engine.states

    @property
    def recipe(self) -> Recipe:
        """The numerics of the converted layers."""
        return self._engine.settings.recipe

    @property
    def steps(self) -> int:
        """Optimizer steps of the model since its conversion."""
        return self._engine.clock.steps

    def configure(
        self,
        learning_rate: DeviationFactor | None = None,
        bit_width: BitWidthRule | None = None,
        monitor_every: int | None = None,
    ) -> None:
        """Put rules in place of the recipe's, for all layers; None leaves what there is. For callbacks, in ``setup``.

        Args:
            learning_rate: Rule of the per-layer learning-rate factors.
            bit_width: Rule that adapts the widths.
            monitor_every: Optimizer steps between measurements of the quantization error of every operand.
        """
        self._engine.configure(learning_rate, bit_width, monitor_every)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert ``module`` in place; Lightning calls this before every fit, validate, test and predict."""
        self._engine.convert(module)
        return module

    def connect(self, model: nn.Module, optimizers: Any, lr_schedulers: Any) -> tuple[nn.Module, Any, Any]:
        """Take note of the device and the rank; log the conversion report when a fit begins."""
        self.device = next(model.parameters()).device.type
        if self.precision == "16-mixed" and self.scaler is None:
            self.scaler = torch.amp.GradScaler(device=self.device)
        # A wrapper such as DDP keeps the LightningModule in `module`, a name that a LightningModule may use itself.
        module = model if hasattr(model, "_trainer") else getattr(model, "module", model)
        trainer = getattr(module, "_trainer", None)
        self._engine.optimizers = max(1, len(optimizers))
        self._engine.convert(module)  # again: a strategy may have put SyncBatchNorm in place of batch norms since
        self._engine.set_rank(0 if trainer is None else trainer.global_rank)
        self._engine.check_optimizers(optimizers)
        self._model = module
        if trainer is not None and trainer.training:
            rank_zero_info(str(self.report))
        return model, optimizers, lr_schedulers

    def autocast_context_manager(self) -> AbstractContextManager:  # type: ignore[override]
        """Autocast of the float layers; none in "32-true"."""
        return nullcontext() if self.precision == "32-true" else super().autocast_context_manager()

    def pre_backward(self, tensor: torch.Tensor, module: Any) -> torch.Tensor:
        """Hand over to the parent, unless this is not a Trainer."""
        if not hasattr(module, "_trainer"):
            raise TypeError("this Int8Precision is the Trainer's; Fabric takes lightning_int8.fabric.Int8Precision")
        return super().pre_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step, then agree with the other ranks on clip values, widths and learning-rate factors."""
        self._engine.clock.epoch_steps = _epoch_steps(model.trainer)
        with self._engine.stepping():
            result = super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        self._engine.after_step(self._loss_scale())
        return result

    def _loss_scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def _clip_gradients(self, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # The parent asks for its own package's LightningModule, but the module may be of the other one.
        host = type(model.trainer).__module__.split(".")[0]
        if host == "pytorch_lightning":
            from pytorch_lightning.plugins.precision import Precision

            Precision._clip_gradients(self, model, optimizer, *args, **kwargs)
        else:
            super()._clip_gradients(model, optimizer, *args, **kwargs)

    def teardown(self) -> None:
        """Log what was executed."""
        summary = self._engine.summary()
        if summary is not None and sys.exc_info()[0] is None:
            rank_zero_info(summary)

    def state_dict(self) -> dict[str, Any]:
        """Clip values, random keys and step count; tensors and primitives only. Empty before the conversion."""
        state = self._engine.state_dict()
        return {_ENGINE: state, "scaler": super().state_dict()} if state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; nothing changes if the state does not fit.

        Raises:
            ValueError: The state does not fit; the message names the field.
        """
        if "scaler" not in state_dict:
            raise ValueError("INT8 plugin state: field 'scaler' is missing: the state is truncated")
        self._engine.load_state_dict(state_dict.get(_ENGINE, {}))
        if state_dict["scaler"]:  # empty where the saved run had none
            super().load_state_dict(state_dict["scaler"])
        self._engine.follow_loss_scale(self._loss_scale())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the state under its fixed key, where Lightning takes the name of a subclass."""
        own = type(self).__qualname__
        if own in checkpoint:
            checkpoint[STATE_KEY] = checkpoint.pop(own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Find the state under its fixed key, where a subclass would look for its own name."""
        own = type(self).__qualname__
        if own not in checkpoint and STATE_KEY in checkpoint:
            checkpoint[own] = checkpoint[STATE_KEY]


def _epoch_steps(trainer: Any) -> int | None:
    """Optimizer steps of an epoch, None for a loader of unknown length."""
    batches = trainer.num_training_batches
    # The last, partial accumulation of an epoch steps too.
    return -(-batches // trainer.accumulate_grad_batches) if isinstance(batches, int) and batches else None
