"""Zero points, averaged ranges, a 16-bit gradient off the critical path, and batch norm by the range.

Paper: Banner et al., "Scalable Methods for 8-bit Training of Neural Networks", NeurIPS 2018 (arXiv 1805.11046).

Kept
    All layers, first and last included. Activations and weights in 8 bits with a zero point; the range of activations
    is the average over the batch of each sample's minimum and maximum. The gradient is bifurcated: 8 bits with a zero
    point, stochastic rounding, for grad_input; 16 bits for grad_weight. Range BatchNorm with 16 chunks and the constant
    of the authors' code.

Departures
    - Zero points are integers and ranges include 0; the authors' code shifts by a real minimum, which leaves zeros off
      the grid. 255 levels, not 256.
    - 16 bits are two INT8 planes, largest integer 32,639, rounded stochastically; the authors' code keeps this copy in
      float32.
    - The running average of the range, 0.1 · old + 0.9 · new, is used in training too, not only in evaluation.
    - Range BatchNorm computes in float32 and quantizes neither its input nor its parameters; the contraction that
      follows quantizes what it reads.
"""

from lightning_int8.ranges.absmax import Rule as AbsMax
from lightning_int8.ranges.sample_average import Rule as SampleAverage
from lightning_int8.spec import ContractionSpec, OperandSpec, Recipe

_ACTIVATION = OperandSpec(range=SampleAverage(every=1), affine=True)
_WEIGHT = OperandSpec(range=AbsMax(every=1), affine=True)
_GRADIENT = OperandSpec(range=AbsMax(every=1), affine=True, rounding="stochastic")
_WIDE_GRADIENT = OperandSpec(range=AbsMax(every=1), bits=16, rounding="stochastic")

RECIPE = Recipe(
    name="scalable",
    output=ContractionSpec(lhs=_ACTIVATION, rhs=_WEIGHT),
    grad_input=ContractionSpec(lhs=_GRADIENT, rhs=_WEIGHT),
    grad_weight=ContractionSpec(lhs=_WIDE_GRADIENT, rhs=_ACTIVATION),
    norm="range",
)
