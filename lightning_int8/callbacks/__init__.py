"""Callbacks that configure, override and log what the plugin decides. A recipe is complete without them."""

from lightning_int8.callbacks.adaptive_bit_width import AdaptiveBitWidth
from lightning_int8.callbacks.deviation_counteractive_lr import DeviationCounteractiveLR
from lightning_int8.callbacks.quantization_monitor import QuantizationMonitor

__all__ = ["AdaptiveBitWidth", "DeviationCounteractiveLR", "QuantizationMonitor"]
