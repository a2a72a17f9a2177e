"""What the callbacks share: they find the plugin, hand their arguments over, and log at an interval."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import Metric

from lightning_int8.contraction import LayerState
from lightning_int8.hosts import twin
from lightning_int8.precision import Int8Precision


class PluginCallback(Callback, *twin("pytorch_lightning", "callbacks", "Callback")):  # type: ignore[misc]
    """A callback of a Trainer that has the ``Int8Precision`` plugin. It keeps no state: the plugin does.

    Args:
        log_every_n_steps: Optimizer steps between two records in the loggers of the Trainer.

    Attributes:
        logged: The last record, by name; empty before the first.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(self, log_every_n_steps: int) -> None:
        if not isinstance(log_every_n_steps, int) or isinstance(log_every_n_steps, bool) or log_every_n_steps < 1:
            raise ValueError(f"log_every_n_steps: {log_every_n_steps!r} is not a positive number of optimizer steps")
        self.log_every_n_steps = log_every_n_steps
        self.logged: dict[str, float] = {}
        self._intervals = 0

    def configure(self, plugin: Int8Precision) -> None:
        """Hand the arguments over."""
        raise NotImplementedError

    def values(self, layer: LayerState) -> dict[str, float | Tensor]:
        """What to log of one layer: the same names on every rank; NaN is unknown."""
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Configure the plugin, before it converts the model.

        Raises:
            TypeError: The Trainer has no ``Int8Precision``.
        """
        plugin = trainer.precision_plugin
        if not isinstance(plugin, Int8Precision):
            raise TypeError(
                f"{type(self).__name__} steers the plugin Int8Precision, but the Trainer's is {type(plugin).__name__}; "
                "pass Trainer(plugins=[Int8Precision()])"
            )
        self.configure(plugin)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count intervals, at the step where a resumed run goes on."""
        self._intervals = self._begun(trainer.precision_plugin.steps)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Log after the first step of each interval, which is the one that was measured.

        A batch may bring several steps, or none. Layers that stay float have nothing to log.
        """
        plugin: Int8Precision = trainer.precision_plugin
        begun = self._begun(plugin.steps)
        if begun == self._intervals:
            return
        self._intervals = begun
        values: dict[str, float | Tensor] = {}
        for layer in plugin.layers:
            if not layer.kept_float:
                values |= self.values(layer)
        self.logged = mean_over_ranks(values, pl_module.device)
        for logger in trainer.loggers:
            logger.log_metrics(self.logged, step=trainer.global_step)

    def _begun(self, steps: int) -> int:
        """Number of intervals whose first step is among the first ``steps``."""
        return -(-steps // self.log_every_n_steps)


def mean_over_ranks(values: dict[str, float | Tensor], device: torch.device) -> dict[str, float]:
    """Mean of each value over the ranks that know it; values that no rank knows are left out."""
    if not values:
        return {}
    metric = _KnownMean(len(values)).to(device)
    metric.update(torch.stack([torch.as_tensor(v, dtype=torch.float32).to(device) for v in values.values()]))
    means = metric.compute().tolist()  # the one time the host waits
    return {name: mean for name, mean in zip(values, means, strict=True) if mean == mean}


class _KnownMean(Metric):
    """Mean over updates and ranks of the elements that are finite; NaN where there are none."""

    total: Tensor
    known: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(size), dist_reduce_fx="sum")
        self.add_state("known", torch.zeros(size), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        finite = torch.isfinite(values)
        self.total += torch.where(finite, values, 0.0)
        self.known += finite

    def compute(self) -> Tensor:
        return self.total / self.known
