"""``Int8Precision`` for Lightning Fabric: ``Fabric(plugins=[Int8Precision()])``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import Optimizer

from lightning_int8.engine import HIGH_PRECISION, Engine
from lightning_int8.hosts import twin
from lightning_int8.report import ConversionReport
from lightning_int8.settings import Settings


class Int8Precision(MixedPrecision, *twin("lightning_fabric", "plugins.precision", "Precision")):  # type: ignore[misc]
    """Fabric twin of ``lightning_int8.Int8Precision``; the arguments are the same.

    Every module given to ``fabric.setup`` is converted in place. Fabric does not save the state of its plugins: put
    ``precision.state_dict()`` into what you save, and hand it to ``load_state_dict`` after ``fabric.setup``.

    Example:
        >>> import torch
        >>> from lightning.fabric import Fabric
        >>> precision = Int8Precision(backend="reference")
        >>> fabric = Fabric(accelerator="cpu", plugins=[precision])
        >>> model = fabric.setup(torch.nn.Linear(8, 4))
        >>> precision.reports[0].converted
        ['']
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
        self._settings = Settings.make(
            recipe, skip, layers=layers, backend=backend, fuse=fuse, seed=seed, refresh=refresh
        )
        self._sync_clip = sync_clip
        Engine(self._settings, sync_clip)  # refuses a bad argument now, not at the first model
        # Scaler and autocast device are known at the first forward; until then the parent has the mode without one.
        super().__init__("bf16-mixed", device="cpu")
        self.precision = high_precision
        self._desired_input_dtype = torch.float16 if high_precision == "16-mixed" else torch.bfloat16
        self.scaler: torch.amp.GradScaler | None = None
        self._models: list[tuple[nn.Module, Engine]] = []
        self._optimizers: WeakSet[Optimizer] = WeakSet()

    @property
    def reports(self) -> list[ConversionReport]:
        """The decision for each layer, one report per module that was set up."""
        return [engine.report(model) for model, engine in self._models]

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert ``module`` in place."""
        if not any(model is module for model, _ in self._models):
            engine = Engine(self._settings, self._sync_clip)
            engine.convert(module)
            engine.set_rank(dist.get_rank() if dist.is_available() and dist.is_initialized() else 0)
            self._models.append((module, engine))
        return module

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point inputs to the dtype of autocast; leave them alone in "32-true"."""
        return data if self.precision == "32-true" else super().convert_input(data)

    def convert_output(self, data: Any) -> Any:
        """Cast floating-point outputs to the default dtype; leave them alone in "32-true"."""
        return data if self.precision == "32-true" else super().convert_output(data)

    def forward_context(self) -> AbstractContextManager:
        """Autocast of the float layers on the device of the first model; none in "32-true"."""
        self._follow_device()
        return nullcontext() if self.precision == "32-true" else super().forward_context()

    def _follow_device(self) -> None:
        if self._models:
            self.device = next(self._models[0][0].parameters()).device.type
        if self.precision == "16-mixed" and self.scaler is None:
            self.scaler = torch.amp.GradScaler(device=self.device)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step, then agree on clip values."""
        with ExitStack() as stack:
            for _, engine in self._models:
                stack.enter_context(engine.stepping())
            result = super().optimizer_step(optimizer, **kwargs)
        self._optimizers.add(optimizer)
        for _, engine in self._models:
            engine.check_optimizers([optimizer])
            engine.optimizers = len(self._optimizers)
            engine.after_step(self._loss_scale())
        return result

    def state_dict(self) -> dict[str, Any]:
        """Clip values, random keys and step count of each module, in the order of setup."""
        return {"int8": [engine.state_dict() for _, engine in self._models], "scaler": super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``, after the same modules were set up.

        Raises:
            ValueError: The state does not fit; the message names the field. Nothing has changed then.
        """
        if "scaler" not in state_dict:
            raise ValueError("INT8 plugin state: field 'scaler' is missing: the state is truncated")
        states = state_dict.get("int8", [])
        if len(states) != len(self._models):
            raise ValueError(f"INT8 plugin state: int8: {len(states)} models saved, {len(self._models)} set up")
        for (_, engine), state in zip(self._models, states, strict=True):
            engine.check_state_dict(state)
        for (_, engine), state in zip(self._models, states, strict=True):
            engine.load_state_dict(state)
        self._follow_device()
        if state_dict["scaler"]:  # empty where the saved run had none
            super().load_state_dict(state_dict["scaler"])
        for _, engine in self._models:
            engine.follow_loss_scale(self._loss_scale())

    def _loss_scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.get_scale()
