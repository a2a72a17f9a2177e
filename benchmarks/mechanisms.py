"""What each method does while it trains: clip values, factors, classes, widths, grids, step by step.

Trains a network once per method through the code of ``lightning-int8 train`` and writes, at an interval, what the
method's own mechanism did in each layer. No accuracy: ``accuracy.py`` measures that.

    python benchmarks/mechanisms.py --data fashion-mnist --max-steps 400 --every 20
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from records import RESULTS, machine, origin
from torch import Tensor

from lightning_int8 import Int8Precision, Recipe, numerics, recipes
from lightning_int8.magnitudes import STATISTICS, Statistics
from lightning_int8.optim import FixedPointSGD
from lightning_int8.ranges import RangeRule
from lightning_int8.vision import experiment
from lightning_int8.vision.readers import READERS


@dataclasses.dataclass(frozen=True)
class Recording:
    """A range rule that behaves as ``rule`` and notes for each call what it saw.

    Attributes:
        rule: The rule.
        calls: ``(max|x|, share beyond sigma, clip value)`` per call, newest last; shared by the layers that use it.
    """

    rule: RangeRule
    calls: list[tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=list, compare=False, repr=False)

    @property
    def every(self) -> int | None:
        """See ``RangeRule.every``."""
        return self.rule.every

    def clip_value(
        self, x: Tensor, axis: int | None, previous: Tensor | None, bits: int, statistics: Statistics = STATISTICS
    ) -> Tensor:
        """See ``RangeRule.clip_value``."""
        clip_value = self.rule.clip_value(x, axis, previous, bits, statistics)
        self.calls.append((*statistics.largest_and_share_beyond_sigma(x, axis), clip_value))
        return clip_value


class Log(Callback):
    """Every so many steps, one line per layer of what ``look`` finds."""

    def __init__(self, look: Callable[[Trainer, Int8Precision], dict[str, Any]], every: int) -> None:
        self.look, self.every = look, every
        self.records: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note what there is to see."""
        if (trainer.global_step - 1) % self.every == 0:
            plugin = trainer.precision_plugin
            assert isinstance(plugin, Int8Precision)
            self.records.append({"step": trainer.global_step, **self.look(trainer, plugin)})


def unified(recipe: Recipe) -> tuple[Recipe, Callable[..., dict[str, Any]]]:
    """Clip value over maximum at each refresh, and the learning-rate factor it leads to."""

    def look(trainer: Trainer, plugin: Int8Precision) -> dict[str, Any]:
        ratios, distances = {}, {}
        for layer in plugin.layers:
            gradient = layer.operands["grad_weight.lhs"]
            rule = gradient.spec.range
            if isinstance(rule, Recording) and not layer.kept_float and gradient.distance is not None:
                chosen = [float(clip / top) for top, _, clip in rule.calls if torch.equal(clip, gradient.clip_value)]
                ratios[layer.name] = round(chosen[-1], 4) if chosen else None
                distances[layer.name] = float(f"{float(gradient.distance):.4g}")
        factors = {layer.name: round(layer.factor, 4) for layer in plugin.layers}
        return {"clip value / maximum": ratios, "cosine distance": distances, "learning-rate factor": factors}

    return _with_gradient_rule(recipe, Recording(recipe.grad_weight.lhs.range)), look


def distribution_adaptive(recipe: Recipe) -> tuple[Recipe, Callable[..., dict[str, Any]]]:
    """Channels of the inverted-T class, and how many changed class since the step before."""
    threshold = recipe.grad_weight.lhs.range.threshold  # type: ignore[attr-defined]
    rule = Recording(recipe.grad_weight.lhs.range)
    changed = dataclasses.replace(recipe.grad_weight.lhs, range=rule)
    recipe = dataclasses.replace(recipe, grad_weight=dataclasses.replace(recipe.grad_weight, lhs=changed))
    before: list[Tensor] = []

    def look(trainer: Trainer, plugin: Int8Precision) -> dict[str, Any]:
        # One call for each layer, last layer first; those of the newest step are the last ones.
        layers = [layer for layer in plugin.layers if not layer.kept_float]
        newest = rule.calls[-len(layers) :]
        classes = [share <= threshold for _, share, _ in newest]
        switched = [
            int((now != then).sum()) for now, then in zip(classes, before, strict=False) if now.shape == then.shape
        ]
        before[:] = classes
        clipped = [float((clip < top).float().mean()) for top, _, clip in newest]
        del rule.calls[:]
        return {
            "channels": [len(c) for c in classes],
            "inverted-T": [int(c.sum()) for c in classes],
            "switched since the last record": switched,
            "share of channels clipped": [round(c, 3) for c in clipped],
        }

    return recipe, look


def scalable(recipe: Recipe) -> tuple[Recipe, Callable[..., dict[str, Any]]]:
    """Range and zero point of the activations."""

    def look(trainer: Trainer, plugin: Int8Precision) -> dict[str, Any]:
        found = {}
        for layer in plugin.layers:
            x = layer.operands["output.lhs"]
            if x.clip_value is not None:
                m = numerics.affine_map(x.clip_value, 8, affine=True)
                assert m.zero is not None
                found[layer.name] = [round(-float(m.low[()]), 4), round(float(m.high[()]), 4), int(m.zero)]
        return {"largest negative, largest positive, zero point": found}

    return recipe, look


def wageubn(recipe: Recipe) -> tuple[Recipe, Callable[..., dict[str, Any]]]:
    """Share of momentum and weight entries on their grids (1 is all), and the learning rate in steps of its grid."""

    def look(trainer: Trainer, plugin: Int8Precision) -> dict[str, Any]:
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, FixedPointSGD)
        group = next(g for g in optimizer.param_groups if g["quantized"])
        moments = [optimizer.state[p]["momentum_buffer"] for p in group["params"]]
        return {
            "momentum on the grid of 2^-12": _share_on_grid(moments, group["accumulator_bits"]),
            "weights on the grid of 2^-23": _share_on_grid(group["params"], group["update_bits"]),
            "different values of momentum": len(torch.cat([m.flatten() for m in moments]).unique()),
            "learning rate, steps of 2^-9": round(group["lr"] * 2 ** (group["lr_bits"] - 1)),
        }

    return recipe, look


def fixed_point(recipe: Recipe) -> tuple[Recipe, Callable[..., dict[str, Any]]]:
    """Width of each operand and the step of its next adjustment."""

    def look(trainer: Trainer, plugin: Int8Precision) -> dict[str, Any]:
        operands = {f"{s.name}/{o.slot}": o for s in plugin.layers for o in s.distinct_operands()}
        wide = {name: o.bits for name, o in operands.items() if o.bits > 8}
        later = {name: o.width.next_step for name, o in operands.items() if o.width is not None}
        return {"wider than 8 bits": wide, "next adjustment": later}

    return recipe, look


METHODS = {f.__name__: f for f in (unified, distribution_adaptive, scalable, wageubn, fixed_point)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=READERS, default="fashion-mnist")
    parser.add_argument("--root", help="where the files of the data set are")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--refresh", type=int, default=20)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/mechanisms_DATA_METHOD.json")
    options = parser.parse_args(argv)
    experiment.quieten_lightning()
    settings = dataclasses.replace(experiment.DEFAULTS[options.data], max_steps=options.max_steps)
    images = READERS[options.data](options.root)
    for name in options.methods:
        recipe, look = METHODS[name](recipes.get(name))
        log = Log(look, options.every)
        plugin = Int8Precision(recipe, refresh=options.refresh)
        result = experiment.run(settings, images, {"plugins": [plugin]}, progress=False, callbacks=[log])
        described = dataclasses.asdict(settings) | {"refresh": options.refresh}
        record = {"method": name, "data": options.data, "settings": described, "machine": machine()} | origin()
        record |= {"test_accuracy": result.test_accuracy, "records": log.records}
        path = options.output or RESULTS / f"mechanisms_{options.data}_{name}.json"
        path.write_text(_lines(record))
        print(f"{name}: {result.test_accuracy:.2f} % after {result.steps} steps, written to {path}")
    return 0


def _with_gradient_rule(recipe: Recipe, rule: RangeRule) -> Recipe:
    gradient = dataclasses.replace(recipe.grad_weight.lhs, range=rule)
    return dataclasses.replace(
        recipe,
        grad_input=dataclasses.replace(recipe.grad_input, lhs=gradient),
        grad_weight=dataclasses.replace(recipe.grad_weight, lhs=gradient),
    )


def _share_on_grid(tensors: Sequence[Tensor], bits: int) -> float:
    steps = torch.cat([t.detach().flatten() for t in tensors]).double() * 2 ** (bits - 1)
    return float((steps == steps.round()).double().mean())


def _lines(record: dict[str, Any]) -> str:
    """JSON with one line per record."""
    records = ",\n  ".join(json.dumps(r) for r in record.pop("records"))
    return json.dumps(record, indent=1)[:-2] + f',\n "records": [\n  {records}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
