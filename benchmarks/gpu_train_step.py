"""Time of a whole training step (forward, backward, SGD) on a GPU: INT8 against bfloat16, float32 and torchao's INT8.

Each INT8 step is checked before it is timed: its loss must be near that of float32, and its contractions must be as
many as autograd asks for. Models are those of ``gpu_networks``, and any name of torchvision or timm where these are
installed; torchao takes part where it can be imported. ``gpu_plots.py`` draws the result.

    python benchmarks/gpu_train_step.py
    python benchmarks/gpu_train_step.py --model resnet101 convnext_tiny --batch 128
    python benchmarks/gpu_train_step.py --dry-run        # small networks on the emulated machine, nothing is timed
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_networks import DEFAULT, DRY, Workload, batch_of, parameters_in_millions, workload
from gpu_timing import Target, tf32
from records import RESULTS, add_run, open_record, origin
from torch import Tensor, nn

from lightning_int8 import backends, convert, gemm_counts, recipes
from lightning_int8.vision.required import Contractions, contractions_of_one_step, mismatches

RECIPE = "default"
LOSS_LIMIT = 0.05
"""Largest relative difference of the loss of the first step to that of float32."""

SETTLING_STEPS = 4
"""Ranges are measured at steps 0, 1, 2 and 4, and then at doubling distances: few of the timed steps measure them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", help=f"default: {' '.join(DEFAULT)}; in a dry run {' '.join(DRY)}")
    parser.add_argument("--batch", type=int, help="default: 256 images, 16384 rows of the perceptron, 64 sequences")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps")
    parser.add_argument("--dry-run", action="store_true", help="small networks on the emulated machine, not timed")
    parser.add_argument("--output", type=Path, help="default: results/gpu_train_step.json; none in a dry run")
    options = parser.parse_args(argv)
    target = Target(options.dry_run)
    output = options.output or (None if options.dry_run else RESULTS / "gpu_train_step.json")
    if output:
        open_record(output, target.described() | {"recipe": RECIPE})
    for name in options.model or (DRY if options.dry_run else DEFAULT):
        torch.manual_seed(0)
        try:
            work = workload(name, options.batch, options.dry_run)
        except ValueError as error:
            parser.error(str(error))
        entry = {"network": name, **measure(target, work, options.repeats)} | origin()
        if output:
            add_run(output, entry, summarise)
        print(describe(entry), flush=True)
    print(f"written to {output}" if output else "nothing written")
    return 0


def measure(target: Target, work: Workload, repeats: int) -> dict[str, Any]:
    """Check and time one network in every precision."""
    model = work.model.to(target.place)
    x, labels = batch_of(work, target.place)
    if x.dim() == 4:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    required = contractions_of_one_step(model, x[:2])
    with torch.no_grad():
        truth = float(nn.functional.cross_entropy(copy.deepcopy(model)(x), labels))
    times: dict[str, list[float] | None] = {}
    failures: dict[str, str] = {}
    for name, prepare in precisions(target).items():
        own = copy.deepcopy(model)
        try:
            with prepare(own) as autocast:
                times[name] = _time(target, own, x, labels, autocast, truth, required, name, repeats)
        except (ImportError, torch.cuda.OutOfMemoryError) as error:
            failures[name] = str(error).partition("\n")[0]
        del own
        if not target.dry_run:
            torch.cuda.empty_cache()
    size = {"batch": len(x), "parameters_in_millions": parameters_in_millions(model)}
    return size | {"milliseconds_quartiles": times, "without": failures}


def precisions(target: Target) -> dict[str, Callable[[nn.Module], contextlib.AbstractContextManager[bool]]]:
    """What prepares a model for each precision; its value is whether bfloat16 autocast is on."""

    def int8(family: str | None, autocast: bool) -> Callable[[nn.Module], contextlib.AbstractContextManager[bool]]:
        @contextlib.contextmanager
        def prepare(model: nn.Module) -> Iterator[bool]:
            backend, load = target.backend(family), backends.load
            with mock.patch.object(backends, "load", lambda name: backend if name == "cupy" else load(name)):
                convert(model, recipe=RECIPE, backend="cupy")
                yield autocast

        return prepare

    @contextlib.contextmanager
    def floating(model: nn.Module, rounded: bool = False, autocast: bool = False) -> Iterator[bool]:
        with tf32(rounded):
            yield autocast

    @contextlib.contextmanager
    def torchao(model: nn.Module) -> Iterator[bool]:
        from torchao import quantize_
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig

        quantize_(model, Int8MixedPrecisionTrainingConfig(module_swap=True))
        yield True

    return {
        "int8": int8(None, autocast=True),
        "int8 dp4a, float32 around": int8("dp4a", autocast=False),
        "bfloat16": lambda model: floating(model, autocast=True),
        "float32": floating,
        "float32 TF32": lambda model: floating(model, rounded=True),
        "torchao int8": torchao,
    }


def _time(
    target: Target,
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    autocast: bool,
    truth: float,
    required: Contractions,
    name: str,
    repeats: int,
) -> list[float] | None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(target.place.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    loss = float(step())
    wrong = mismatches(gemm_counts(model), required, recipes.get(RECIPE)) if name.startswith("int8") else []
    if wrong:
        raise RuntimeError(f"{name}: {'; '.join(wrong)}: it is not timed")
    if not abs(loss - truth) <= LOSS_LIMIT * truth:
        raise RuntimeError(f"{name}: the first loss is {loss:.4f}, that of float32 {truth:.4f}: it is not timed")
    for _ in range(SETTLING_STEPS):
        step()
    return target.milliseconds([step], repeats)


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median time of each precision over that of INT8, for each network's newest run."""
    summary = {}
    for run in runs:
        medians = {name: q[1] for name, q in run["milliseconds_quartiles"].items() if q}
        summary[run["network"]] = {
            f"{name} / int8": round(m / medians["int8"], 3) for name, m in medians.items() if name != "int8"
        }
    return summary


def describe(entry: dict[str, Any]) -> str:
    """One line for a person to read."""
    times = entry["milliseconds_quartiles"]
    cells = [f"{name} {q[1]:.1f} ms" if q else f"{name} checked" for name, q in times.items()]
    cells += [f"{name}: {why}" for name, why in entry["without"].items()]
    return f"{entry['network']}, batch {entry['batch']}:  " + ",  ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
