"""The fastest of several exact routes, found by timing at the first use of a shape.

All routes give the same bits, so this choice is free: it never shows in a result.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_int8.backends.cpu.choice_file import ChoiceFile
from lightning_int8.backends.cpu.route import Route, Scales
from lightning_int8.backends.form import Form
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane

REPEATS = 3
"""Timed runs of each route, taken in turn; the shortest counts."""

SMALLEST_TIMED = 1 << 18
"""Products of a contraction below which the first route that can is taken untimed: calls cost more than products."""

SHAPES_TIMED = 8
"""Input shapes of one layer that are timed; later ones, of a net whose inputs vary, follow the last of them."""

_MOST_FOUND = 4096  # problems that are looked up without asking each route; a net with more of them starts over


class Choice:
    """Picks a route for every problem.

    Args:
        routes: To choose from, in the order of preference where nothing is timed.
        trusted: The route that supports every problem, and by which each other one is checked at its first use.
        file: Remembers choices between processes; None takes the first route that can and times nothing.

    Attributes:
        routes: See above.
    """

    def __init__(self, routes: Sequence[Route], trusted: Route, file: ChoiceFile | None) -> None:
        self.routes = list(routes)
        self._trusted = trusted
        self._file = file
        self._picked: dict[str, Route] = {}
        self._found: dict[tuple[Any, ...], Route] = {}
        self._timed: dict[str, list[Route]] = {}

    def run(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None = None) -> Tensor:
        """The contraction by the fastest route, see ``Route.run``; with ``scales`` in their form."""
        return _run(self.pick(contraction, a, b, geometry, scales), contraction, a, b, geometry, scales)

    def pick(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None) -> Route:
        """The route for a problem; at its first use the candidates are checked and timed."""
        key = (contraction, a.data.shape, b.data.shape, geometry, *map(_zero_axes, (a, b)), *_wanted(scales))
        route = self._found.get(key)
        if route is None:
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            route = self._found[key] = self._pick(contraction, a, b, geometry, scales)
        return route

    def _pick(self, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None) -> Route:
        able = (r for r in self.routes if r.supports(contraction, a, b, geometry, scales is not None))
        if self._file is None or _products(contraction, a, b, geometry) < SMALLEST_TIMED:
            return next(able)
        layer = _layer(contraction, a, b, geometry, scales)
        problem = f"{layer}, input {'x'.join(map(str, (a.data.shape[0], *geometry.input_size)))}"
        if problem in self._picked:
            return self._picked[problem]
        candidates = list(able)
        if scales is not None and scales.form.moments is not None:
            # Sums of floats depend on their order: where a route sums them at all, timings must not change the result.
            candidates = [r for r in candidates if r.finishes] or candidates
        timed = self._timed.setdefault(layer, [])
        if len(timed) >= SHAPES_TIMED:
            return timed[-1] if timed[-1] in candidates else candidates[0]
        exact = self._checked(candidates, contraction, a, b, geometry, scales)
        among = f"{problem}, fastest of {', '.join(r.name for r in exact)}"
        remembered = self._file.get(among)
        route = exact[0] if len(exact) == 1 else next((r for r in exact if r.name == remembered), None)
        if route is None:
            route = fastest(exact, contraction, a, b, geometry, scales)
            self._file.put(among, route.name)
        self._picked[problem] = route
        timed.append(route)
        return route

    def _checked(
        self,
        candidates: list[Route],
        contraction: str,
        a: Plane,
        b: Plane,
        geometry: ConvGeometry,
        scales: Scales | None,
    ) -> list[Route]:
        """The candidates whose result for this very problem is the trusted one's, to the bit."""
        probe = None
        if scales is not None:
            # Scales of many digits, so that another order of rounding shows; the real ones may even be NaN.
            # They begin differently, or an exchange of two would not show.
            bias = None if scales.form.bias is None else _probe(scales.form.bias, -0.2)
            probe = Scales(_probe(scales.left, 0.37), _probe(scales.right, 0.1), Form(scales.form.dtype, bias))
        expected = _run(self._trusted, contraction, a, b, geometry, probe)
        exact = []
        for route in candidates:
            if route is self._trusted or torch.equal(_run(route, contraction, a, b, geometry, probe), expected):
                exact.append(route)
            else:
                warnings.warn(
                    f"route {route.name!r} is not exact for {contraction} of {geometry} on this CPU: not used there",
                    stacklevel=2,
                )
        return exact


def fastest(
    routes: list[Route], contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None
) -> Route:
    """The route whose shortest of ``REPEATS`` runs is shortest."""
    best = dict.fromkeys(routes, float("inf"))
    for _ in range(REPEATS):
        for route in routes:
            start = time.perf_counter()
            _run(route, contraction, a, b, geometry, scales)
            best[route] = min(best[route], time.perf_counter() - start)
    return min(routes, key=best.__getitem__)


def _probe(vector: Tensor, first: float) -> Tensor:
    return torch.linspace(first, 0.9, vector.numel()).reshape(vector.shape)


def _run(route: Route, contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None) -> Tensor:
    result = route.run(contraction, a, b, geometry, scales)
    return result if scales is None or route.finishes else scales.form.finish(result)


def _layer(contraction: str, a: Plane, b: Plane, geometry: ConvGeometry, scales: Scales | None) -> str:
    """All that a time depends on but the size of the input."""
    out, per_group = b.data.shape[0], b.data.shape[-1]
    if contraction == "grad_weight":
        out, per_group = a.data.shape[-1], b.data.shape[-1] // geometry.groups
    affine = "".join("z" if p.zero_point is not None else "-" for p in (a, b))
    windows = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    form = "sums" if scales is None else str(scales.form.dtype).removeprefix("torch.")
    if scales is not None and scales.form.moments is not None:
        form += " with moments"
    if scales is not None and scales.form.bias is not None:
        form += " with a bias"
    return f"{contraction} {form} {affine}, {out}:{per_group}, windows {windows}, {torch.get_num_threads()} threads"


def _zero_axes(plane: Plane) -> int | None:
    return None if plane.zero_point is None else plane.zero_point.dim()


def _wanted(scales: Scales | None) -> tuple[Any, ...]:
    """What routes are chosen by, of scales, and the number of threads."""
    if scales is None:
        return None, torch.get_num_threads()
    form = scales.form
    return form.dtype, form.bias is None, form.moments is None, torch.get_num_threads()


def _products(contraction: str, a: Plane, b: Plane, geometry: ConvGeometry) -> int:
    """About how many products the contraction takes (grad_input fewer, where there is a stride)."""
    if contraction == "grad_weight":
        return a.data.numel() * geometry.taps * b.data.shape[-1] // geometry.groups
    return a.data.shape[0] * prod(geometry.output_size) * b.data.numel()
