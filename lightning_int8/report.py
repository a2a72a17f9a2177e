"""What conversion did to each layer, and what the layers then executed: tables to read, dictionaries to store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from lightning_int8 import backends
from lightning_int8.contraction import LayerState
from lightning_int8.spec import CONTRACTIONS


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer that multiplies matrices.

    Attributes:
        name: Name of the layer in the model.
        kind: Its class before conversion.
        shape: Shape of its weight.
        decision: "int8" or "float"; for a batch norm what it became, "range" or "fixed_point".
        reason: Why.
        route: How its contractions are computed, each of them once a training step has run; empty for a float layer.
        gain: How fast it is against float, once ``layers="auto"`` has timed both; empty for a float layer.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    decision: str
    reason: str
    route: str = ""
    gain: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """The decision for each layer, in the order of the model.

    Attributes:
        recipe: Name of the recipe.
        rows: One per layer that multiplies matrices, and per batch norm that the recipe replaces.
    """

    recipe: str
    rows: tuple[Row, ...]

    @property
    def converted(self) -> list[str]:
        """Names of the layers that run INT8."""
        return [row.name for row in self.rows if row.decision == "int8"]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {"recipe": self.recipe, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        body = [(r.name, r.kind, "x".join(map(str, r.shape)), r.decision, r.reason, r.route, r.gain) for r in self.rows]
        multiply = sum(row.decision in ("int8", "float") for row in self.rows)
        head = f"INT8 conversion, recipe '{self.recipe}': {len(self.converted)} of {multiply} layers run INT8"
        return head + "\n" + table(("layer", "kind", "weight", "decision", "reason", "route", "gain"), body)


def current(report: ConversionReport, model: nn.Module) -> ConversionReport:
    """The report as things stand: layers that stay float after all, routes where the weights now lie."""
    modules = dict(model.named_modules())

    def update(row: Row) -> Row:
        if row.decision != "int8":
            return row
        state: LayerState = modules[row.name].int8_state
        if state.kept_float:
            return replace(row, decision="float", reason=state.kept_float, route="")
        try:
            backend = backends.backend_for(modules[row.name].weight, state.backend)
        except RuntimeError as error:
            return replace(row, route=str(error).split(";")[0])
        routes = ", ".join(f"{c} by {state.counts.routes[c]}" for c in CONTRACTIONS if c in state.counts.routes)
        route = f"{backend.name}: {routes}" if routes else backend.route(convolution=len(row.shape) > 2)
        return replace(row, route=route, gain="" if state.times is None else state.times.gain)

    return replace(report, rows=tuple(update(row) for row in report.rows))


def gemm_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Plane-by-plane INT8 contractions that each converted layer executed so far.

    Contractions of the ``reference`` backend are no INT8 contractions and are not counted here.

    Returns:
        ``{"layer.name": {"output": n, "grad_input": n, "grad_weight": n}}``, by the names of ``model``.
    """
    return {
        name: {c: int8_count(state, c) for c in CONTRACTIONS}
        for name, module in model.named_modules()
        if isinstance(state := getattr(module, "int8_state", None), LayerState)
    }


def int8_count(state: LayerState, contraction: str) -> int:
    """Executions of one contraction of one layer on integer backends."""
    return sum(n for (b, c), n in state.counts.items() if c == contraction and backends.load(b).integer)


def execution_table(states: Sequence[LayerState]) -> str:
    """What the converted layers executed, one row per layer and backend; layers never called are listed as such."""
    body = []
    for state in states:
        for backend in dict.fromkeys(b for b, _ in state.counts) or ("never called",):
            counts = [state.counts[backend, c] for c in CONTRACTIONS]
            body.append((state.name, backend, *map(str, counts)))
    totals = [sum(int8_count(s, c) for s in states) for c in CONTRACTIONS]
    body.append(("total INT8", "", *map(str, totals)))
    return "Contractions executed (0: autograd did not need it)\n" + table(("layer", "backend", *CONTRACTIONS), body)


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Plain text table with a rule under its header."""
    rows = [tuple(header), *map(tuple, body)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
