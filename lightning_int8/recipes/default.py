"""The recipe used where none is named: 8 bits everywhere, unbiased gradients.

Paper: none; the common ground of the methods in this folder.

- Weights: nearest rounding, one scale per output channel for the output and per input channel for grad_input, from the
  weight of the step itself.
- Activations: nearest rounding, one scale per tensor, refreshed at the conversion's interval.
- Gradients: stochastic rounding, one draw for both contractions, one scale per tensor, refreshed at the interval.
"""

from lightning_int8.ranges.absmax import Rule as AbsMax
from lightning_int8.spec import ContractionSpec, OperandSpec, Recipe

_ACTIVATION = OperandSpec()
_WEIGHT = OperandSpec(per="channel", range=AbsMax(every=1))
_GRADIENT = OperandSpec(rounding="stochastic")

RECIPE = Recipe(
    name="default",
    output=ContractionSpec(lhs=_ACTIVATION, rhs=_WEIGHT),
    grad_input=ContractionSpec(lhs=_GRADIENT, rhs=_WEIGHT),
    grad_weight=ContractionSpec(lhs=_GRADIENT, rhs=_ACTIVATION),
)
