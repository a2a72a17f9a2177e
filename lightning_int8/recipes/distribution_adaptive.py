"""One scale per gradient channel where the weight gradient allows it, clipping by the shape of each distribution.

Paper: Zhao et al., "Distribution Adaptive INT8 Quantization for Training CNNs", AAAI 2021 (arXiv 2102.04782).

Kept
    8 bits for weights, activations and gradients. The gradient is quantized twice: with one scale per output channel
    for grad_weight, with one per tensor for grad_input. Magnitude-aware clipping: channels with P(|g| > sigma) > 0.3
    keep their maximum, the others take 0.2 · previous + 0.8 · maximum. Ranges of gradients at every step.

Departures
    - Gradients are rounded stochastically; the printed formula shows plain rounding.
    - The scale of grad_input follows the same rule on the whole tensor; the sources do not say.
    - A channel that changes class to inverted-T averages with its previous maximum.
    - Ranges of weights and activations are refreshed at every step, as no period is stated.
    - The first training step runs first and last layer in INT8, as it shows which they are.
"""

from lightning_int8.ranges.absmax import Rule as AbsMax
from lightning_int8.ranges.magnitude_aware_clip import Rule as MagnitudeAwareClip
from lightning_int8.spec import ContractionSpec, OperandSpec, Recipe

_NEAREST = OperandSpec(range=AbsMax(every=1))
_GRADIENT = OperandSpec(range=MagnitudeAwareClip(every=1), rounding="stochastic")
_GRADIENT_PER_CHANNEL = OperandSpec(range=MagnitudeAwareClip(every=1), rounding="stochastic", per="channel")

RECIPE = Recipe(
    name="distribution_adaptive",
    output=ContractionSpec(lhs=_NEAREST, rhs=_NEAREST),
    grad_input=ContractionSpec(lhs=_GRADIENT, rhs=_NEAREST),
    grad_weight=ContractionSpec(lhs=_GRADIENT_PER_CHANNEL, rhs=_NEAREST),
    keep_float=("first", "last"),
)
