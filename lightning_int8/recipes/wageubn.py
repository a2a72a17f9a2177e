"""Full-integer training: power-of-two and fixed grids, the flag format, fixed-point batch norm, momentum and update.

Paper: Yang et al., "Training High-Performance and Large-Scale Deep Neural Networks with Full 8-bit Integers" (WAGEUBN),
Neural Networks 2020 (arXiv 1909.02384).

Kept
    Weights on the grid of 2^-7 (direct quantization). Gradients of the outputs in the 9-bit flag format on a power of
    two (E2, full-8-bit variant), or in 16 bits (``make(error_bits=16)``, the 16-bit-E2 variant); gradients at the norms
    in 8 bits by shift quantization (E1). Fixed-point batch norm. Nearest rounding. First and last layer in float.
    Momentum, learning rate and update are quantized by ``lightning_int8.optim.FixedPointSGD``, which the user returns
    from ``configure_optimizers``.

Departures
    - Direct quantization has no clip; in INT8 planes it saturates. Weights saturate at ±127/128 as in the authors'
      code; activations have ``activation_bits`` bits before the binary point, and the step grows as much.
    - 16 bits are two INT8 planes, largest integer 32,639: errors saturate at 0.996 R, not at 32,767/32,768 of it.
    - The fine code of the flag format is clipped to ±127, as is E1; the authors' code reaches 128.
    - E1 is quantized behind the mask of the activation function, where the norm receives it.
    - The normalised value of the batch norm has 8 bits, as in the authors' code; the paper says 16.
    - The first training step runs first and last layer in INT8, as it shows which they are.
"""

from lightning_int8.ranges.fixed_grid import Rule as FixedGrid
from lightning_int8.ranges.power_of_two import Rule as PowerOfTwo
from lightning_int8.spec import ContractionSpec, OperandSpec, Recipe


def make(error_bits: int = 9, activation_bits: int = 2) -> Recipe:
    """Build the recipe.

    Args:
        error_bits: Width of the gradient of the output: 9 is the flag format, 16 two planes.
        activation_bits: Bits of an activation before the binary point.
    """
    activation = OperandSpec(range=FixedGrid(integer_bits=activation_bits))
    weight = OperandSpec(range=FixedGrid(every=1))
    error = OperandSpec(range=PowerOfTwo(every=1, rounding="nearest"), bits=error_bits)
    return Recipe(
        name="wageubn",
        output=ContractionSpec(lhs=activation, rhs=weight),
        grad_input=ContractionSpec(lhs=error, rhs=weight),
        grad_weight=ContractionSpec(lhs=error, rhs=activation),
        norm="fixed_point",
        optimizer="FixedPointSGD",
        keep_float=("first", "last"),
    )


RECIPE = make()
