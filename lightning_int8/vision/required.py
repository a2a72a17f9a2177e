"""How many contractions autograd asks of each layer: the independent figure that the INT8 counters must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lightning_int8.numerics import plane_count
from lightning_int8.policies import WIDTHS
from lightning_int8.spec import CONTRACTIONS, OPERANDS, Recipe

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Contractions = dict[str, dict[str, int]]
"""``{"layer.name": {"output": n, "grad_input": n, "grad_weight": n}}``."""


def contractions_of_one_step(network: nn.Module, images: Tensor) -> Contractions:
    """Count the contractions of one forward and backward pass by asking autograd, on a copy of ``network``.

    The layers come in the order in which they ran, those that did not at the end.

    ``grad_input`` counts where the layer's input needs a gradient and one arrives at its output, ``grad_weight``
    where its weight does. Nothing is read from the INT8 layers.

    Args:
        network: In ordinary floating point, not converted.
        images: float32 ``(B, C, H, W)`` on the network's device, B at least 2.
    """
    probe = copy.deepcopy(network).train()
    counts: Contractions = {}
    ran: Contractions = {}
    for name, layer in probe.named_modules():
        if isinstance(layer, LAYERS):
            counts[name] = dict.fromkeys(CONTRACTIONS, 0)
            layer.register_forward_hook(_counting_hook(counts[name]))
            layer.register_forward_hook(lambda *_, name=name: ran.setdefault(name, counts[name]) and None)
    probe(images).sum().backward()
    return ran | counts


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


def contractions_of_a_run(
    one_step: Contractions,
    training_steps: int,
    evaluation_steps: int,
    keep_float: Sequence[str] = (),
    float_layers: Sequence[str] = (),
) -> Contractions:
    """Scale the contractions of one step to a run; an evaluation step makes the forward contractions only.

    Args:
        one_step: In the order in which the layers ran.
        training_steps: Number of steps with forward and backward pass.
        evaluation_steps: Number of forward passes alone.
        keep_float: ``Recipe.keep_float``: the first or the last layer makes the contractions of one step, then none.
        float_layers: Names of others of which the same holds.
    """
    ran = [name for name, step in one_step.items() if step["output"]]
    kept = {{"first": ran[0], "last": ran[-1]}[position] for position in keep_float} | set(float_layers)
    whole = {
        name: {
            "output": step["output"] * (training_steps + evaluation_steps),
            "grad_input": step["grad_input"] * training_steps,
            "grad_weight": step["grad_weight"] * training_steps,
        }
        for name, step in one_step.items()
    }
    return {name: one_step[name] if name in kept else whole[name] for name in whole}


def mismatches(counted: Contractions, required: Contractions, recipe: Recipe) -> list[str]:
    """Return one line for each layer and contraction whose INT8 counter is not what autograd required.

    Args:
        counted: Of the converted layers, from ``lightning_int8.gemm_counts``; that there are none is a mismatch.
        required: Of every layer.
        recipe: Says how many planes an operand has: two operands of m and n planes make m times n INT8 contractions.
            Where widths adapt, a count may lie between those of the smallest and of the largest width.
    """
    lines = [] if counted else ["no layer was converted"]
    for contraction in CONTRACTIONS:
        least, most = _products(recipe, contraction)
        for name, count in counted.items():
            passes = required.get(name, {}).get(contraction, 0)
            if not least * passes <= count[contraction] <= most * passes:
                wanted = f"{least * passes}" if least == most else f"{least * passes} to {most * passes}"
                lines.append(f"{name} {contraction}: {count[contraction]} INT8 contractions, {wanted} required")
    return lines


def _products(recipe: Recipe, contraction: str) -> tuple[int, int]:
    """INT8 contractions that one contraction takes at least and at most."""
    least = most = 1
    spec, rule = getattr(recipe, contraction), recipe.bit_width
    for operand, tensor in zip((spec.lhs, spec.rhs), OPERANDS[contraction], strict=True):
        adapts = rule is not None and tensor in rule.operands and operand.bits in WIDTHS
        least *= plane_count(operand.bits)
        most *= plane_count(rule.max_bits if adapts and rule else operand.bits)
    return least, most
