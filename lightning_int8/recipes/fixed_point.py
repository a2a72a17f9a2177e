"""Power-of-two resolutions whose width follows the measured quantization error: 8, 16 or 24 bits per operand.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020 (arXiv 1911.00361).

Kept
    One power-of-two resolution per tensor for weights, activations and gradients of the outputs, nearest rounding.
    Quantization error measurement (Diff against 0.03) and parameter adjustment at intervals that follow error and
    drift; widths of 8, 16 and 24 bits for each operand of each layer, growing only (mode 1). No layer stays in float.

Departures
    - A resolution maps the maximum to 127, 32,639 or 8,355,711: the largest sums of INT8 planes; the clip is
      symmetric.
    - A new width takes effect at the step after the one that measured it.
    - An operand without any nonzero value waits for one, where the third-party code sets its exponent to -12.
    - The moving average of the log2 resolution begins at 0, which the sources leave open: until it has come near,
      adjustments are frequent.
    - The length of an epoch, which bounds the interval, is the Trainer's.
"""

from lightning_int8.policies import BitWidthRule
from lightning_int8.ranges.power_of_two import Rule as PowerOfTwo
from lightning_int8.spec import ContractionSpec, OperandSpec, Recipe

_OPERAND = OperandSpec(range=PowerOfTwo())
_CONTRACTION = ContractionSpec(lhs=_OPERAND, rhs=_OPERAND)

RECIPE = Recipe(
    name="fixed_point",
    output=_CONTRACTION,
    grad_input=_CONTRACTION,
    grad_weight=_CONTRACTION,
    bit_width=BitWidthRule(),
)
