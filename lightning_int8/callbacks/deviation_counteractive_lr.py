"""Scale each layer's learning rate down by how far quantization turns its gradient."""

from __future__ import annotations

from torch import Tensor

from lightning_int8.callbacks.plugin_callback import PluginCallback
from lightning_int8.contraction import LayerState
from lightning_int8.policies import DeviationFactor
from lightning_int8.precision import Int8Precision


class DeviationCounteractiveLR(PluginCallback):
    """Deviation-counteractive learning-rate scaling (Zhu et al. 2019), with any recipe.

    Each layer's updates are multiplied by ``max(exp(-alpha · d), beta)``, d the cosine distance between the gradient of
    its output and the quantized gradient at the last refresh. The optimizer, its schedule and what LearningRateMonitor
    shows stay as they are: the plugin scales the finished update.

    Args:
        alpha: How fast the factor falls with the distance.
        beta: Smallest factor.
        log_every_n_steps: Optimizer steps between records ``learning_rate_factor/<layer>``.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_int8 import Int8Precision
        >>> callback = DeviationCounteractiveLR(alpha=20.0, beta=0.1)
        >>> trainer = Trainer(plugins=[Int8Precision()], callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(self, alpha: float = 20.0, beta: float = 0.1, log_every_n_steps: int = 100) -> None:
        super().__init__(log_every_n_steps)
        self.rule = DeviationFactor(alpha=alpha, beta=beta)

    def configure(self, plugin: Int8Precision) -> None:
        """See ``PluginCallback.configure``."""
        plugin.configure(learning_rate=self.rule)

    def values(self, layer: LayerState) -> dict[str, float | Tensor]:
        """See ``PluginCallback.values``."""
        distance = layer.operands["grad_weight.lhs"].distance
        return {
            f"learning_rate_factor/{layer.name}": layer.factor,
            f"cosine_distance/{layer.name}": float("nan") if distance is None else distance,
        }
