"""Direction-sensitive clipping and deviation-counteractive learning rates.

Paper: Zhu et al., "Towards Unified INT8 Training for Convolutional Neural Network", CVPR 2020 (arXiv 1912.12607).

Kept
    8 bits for weights, activations and gradients, one symmetric scale per tensor. Nearest rounding for weights and
    activations, stochastic for gradients; one draw serves both backward contractions. The gradient's clip value
    minimises the cosine distance between the gradient and its quantized self. Clip values are refreshed every T steps
    (``refresh=100``). Each layer's updates are scaled by max(exp(-20 d), 0.1). First and last layer in float.

Departures
    - The search of the clip value, which the sources leave open, looks at k/1000 of the maximum, k = 1 ... 1000, on a
      histogram. The distance is that of nearest rounding.
    - The factor scales the finished update (outside the momentum buffer), decoupled weight decay included. It acts from
      the step after the one that measured the distance.
    - Besides every T steps, ranges are refreshed at steps 1, 2, 4, 8, ... before the first interval.
    - Linear layers are quantized as convolutions are. The first training step runs first and last layer in INT8, as it
      shows which they are.
"""

from lightning_int8.policies import DeviationFactor
from lightning_int8.ranges.direction_sensitive_clip import Rule as DirectionSensitiveClip
from lightning_int8.spec import ContractionSpec, OperandSpec, Recipe

_NEAREST = OperandSpec()
_GRADIENT = OperandSpec(range=DirectionSensitiveClip(), rounding="stochastic")

RECIPE = Recipe(
    name="unified",
    output=ContractionSpec(lhs=_NEAREST, rhs=_NEAREST),
    grad_input=ContractionSpec(lhs=_GRADIENT, rhs=_NEAREST),
    grad_weight=ContractionSpec(lhs=_GRADIENT, rhs=_NEAREST),
    learning_rate=DeviationFactor(alpha=20.0, beta=0.1),
    keep_float=("first", "last"),
)
