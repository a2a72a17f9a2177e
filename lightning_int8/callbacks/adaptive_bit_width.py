"""Let the measured quantization error decide the width of each operand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_int8.callbacks.plugin_callback import PluginCallback
from lightning_int8.contraction import LayerState
from lightning_int8.policies import BitWidthRule
from lightning_int8.precision import Int8Precision


class AdaptiveBitWidth(PluginCallback):
    """Widths of 8, 16 or 24 bits per layer and operand by measured error (Zhang et al. 2020), with any recipe.

    A wide operand is two or three INT8 planes: every contraction still runs on INT8 products. The plugin decides and
    remembers; checkpoints carry the widths. Range rules with an interval of their own (``every``) keep it; the others
    measure at adjustments, not at the plugin's ``refresh``.

    Args:
        threshold: Largest tolerated ``Diff``, the log2 shift of the mean magnitude.
        mode: 1: a width never shrinks. 2: each adjustment begins again at the recipe's width.
        max_bits: Largest width: 8, 16 or 24.
        operands: Which tensors adapt: any of "x", "w", "g".
        epoch_steps: Optimizer steps of an epoch, the longest interval; None takes the Trainer's number.
        log_every_n_steps: Optimizer steps between records ``bits/<layer>/<slot>``.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_int8 import Int8Precision
        >>> callback = AdaptiveBitWidth(threshold=0.03, operands=("g",))
        >>> trainer = Trainer(plugins=[Int8Precision()], callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        threshold: float = 0.03,
        mode: int = 1,
        max_bits: int = 24,
        operands: Sequence[str] = ("x", "w", "g"),
        epoch_steps: int | None = None,
        log_every_n_steps: int = 100,
    ) -> None:
        super().__init__(log_every_n_steps)
        self.rule = BitWidthRule(
            threshold=threshold, mode=mode, max_bits=max_bits, operands=operands, epoch_steps=epoch_steps
        )

    def configure(self, plugin: Int8Precision) -> None:
        """See ``PluginCallback.configure``."""
        plugin.configure(bit_width=self.rule)

    def values(self, layer: LayerState) -> dict[str, float | Tensor]:
        """See ``PluginCallback.values``."""
        return {f"bits/{layer.name}/{o.slot}": float(o.bits) for o in layer.distinct_operands()}
