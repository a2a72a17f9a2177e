"""How many contractions autograd asks of each layer: the independent figure that the INT8 counters must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from lightning_int8.numerics import plane_count
from lightning_int8.spec import CONTRACTIONS, Recipe

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Contractions = dict[str, dict[str, int]]
"""``{"layer.name": {"output": n, "grad_input": n, "grad_weight": n}}``."""


def contractions_of_one_step(network: nn.Module, images: Tensor) -> Contractions:
    """Count the contractions of one forward and backward pass by asking autograd, on a copy of ``network``.

    ``grad_input`` counts where the layer's input needs a gradient and one arrives at its output, ``grad_weight``
    where its weight does. Nothing is read from the INT8 layers.

    Args:
        network: In ordinary floating point, not converted.
        images: float32 ``(B, C, H, W)`` on the network's device, B at least 2.
    """
    probe = copy.deepcopy(network).train()
    counts: Contractions = {}
    for name, layer in probe.named_modules():
        if isinstance(layer, LAYERS):
            counts[name] = dict.fromkeys(CONTRACTIONS, 0)
            layer.register_forward_hook(_counting_hook(counts[name]))
    probe(images).sum().backward()
    return counts


def _counting_hook(count: dict[str, int]) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    def after_forward(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        count["output"] += 1
        needs_input = inputs[0].requires_grad
        needs_weight = layer.get_parameter("weight").requires_grad

        def after_backward(gradient: Tensor) -> None:
            count["grad_input"] += needs_input
            count["grad_weight"] += needs_weight

        if output.requires_grad:
            output.register_hook(after_backward)

    return after_forward


def contractions_of_a_run(one_step: Contractions, training_steps: int, evaluation_steps: int) -> Contractions:
    """Scale the contractions of one step to a run; an evaluation step makes the forward contractions only."""
    return {
        name: {
            "output": step["output"] * (training_steps + evaluation_steps),
            "grad_input": step["grad_input"] * training_steps,
            "grad_weight": step["grad_weight"] * training_steps,
        }
        for name, step in one_step.items()
    }


def mismatches(counted: Contractions, required: Contractions, recipe: Recipe) -> list[str]:
    """Return one line for each layer and contraction whose INT8 counter is not what autograd required.

    Args:
        counted: Of the converted layers, from ``lightning_int8.gemm_counts``; that there are none is a mismatch.
        required: Of every layer.
        recipe: Says how many planes an operand has: two operands of m and n planes make m times n INT8 contractions.
    """
    lines = [] if counted else ["no layer was converted"]
    for contraction in CONTRACTIONS:
        spec = getattr(recipe, contraction)
        products = plane_count(spec.lhs.bits) * plane_count(spec.rhs.bits)
        for name, count in counted.items():
            expected = required.get(name, {}).get(contraction, 0) * products
            if count[contraction] != expected:
                lines.append(f"{name} {contraction}: {count[contraction]} INT8 contractions, {expected} required")
    return lines
