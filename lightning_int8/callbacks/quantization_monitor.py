"""Log how well the operands of each layer survive quantization."""

from __future__ import annotations

from torch import Tensor

from lightning_int8.callbacks.plugin_callback import PluginCallback
from lightning_int8.contraction import LayerState
from lightning_int8.precision import Int8Precision


class QuantizationMonitor(PluginCallback):
    """Clip value, saturation rate, cosine distance and shift of the mean magnitude of every operand of every layer.

    Measured at one step of each interval, over the whole tensor, with nearest rounding; mean over ranks. In between it
    costs nothing.

    Args:
        log_every_n_steps: Optimizer steps between records ``quantization/<layer>/<slot>/<figure>``.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_int8 import Int8Precision
        >>> monitor = QuantizationMonitor(log_every_n_steps=500)
        >>> trainer = Trainer(plugins=[Int8Precision()], callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    def __init__(self, log_every_n_steps: int = 100) -> None:
        super().__init__(log_every_n_steps)

    def configure(self, plugin: Int8Precision) -> None:
        """See ``PluginCallback.configure``."""
        plugin.configure(monitor_every=self.log_every_n_steps)

    def values(self, layer: LayerState) -> dict[str, float | Tensor]:
        """See ``PluginCallback.values``."""
        values: dict[str, float | Tensor] = {}
        for operand in layer.distinct_operands():
            figures: dict[str, float | Tensor] = dict.fromkeys(
                ("clip_value", "cosine_distance", "magnitude_shift", "saturation"), float("nan")
            )
            if operand.clip_value is not None:
                figures["clip_value"] = operand.clip_value.mean()
            if operand.error is not None:
                figures["cosine_distance"] = operand.error.cosine_distance[0]
                figures["magnitude_shift"] = operand.error.magnitude_shift[0]
                figures["saturation"] = operand.error.saturation[0]
            values |= {f"quantization/{layer.name}/{operand.slot}/{name}": v for name, v in figures.items()}
        return values
