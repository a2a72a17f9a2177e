"""Tensors that are not computed yet: a few elementwise operations, done while somebody reads the elements.

Between two convolutions a tensor is normalized, added to, rectified and then quantized. Each of these steps is cheap to
compute and costs a walk through memory; an ``Expression`` remembers them until the walk that quantizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor

from lightning_int8.backends.cpu.passes import compiled_pass

MASK_BITS = 16
"""Elements of one word of a mask."""


class Mask:
    """Which elements of a rectified tensor are kept, one bit each.

    Attributes:
        words: int16 ``(ceil(elements / MASK_BITS),)``, the first element in the lowest bit; None until the tensor is
            computed for the first time.
        expression: That tensor, until then.
    """

    words: Tensor | None = None
    expression: Expression | None = None

    def known(self) -> Tensor:
        """The words; a tensor whose values nobody has asked for is computed for their sake."""
        if self.words is None:
            assert self.expression is not None
            self.expression.values()
        assert self.words is not None
        return self.words


@dataclass(frozen=True)
class Windows:
    """Windows over the two spatial axes of ``(N, H, W, C)``.

    Attributes:
        shape: The tensor.
        size: Number of windows, down and across.
        kernel: Rows and columns of one.
        stride: Distance of neighbours.
        padding: Rows above and columns to the left that no window counts.
    """

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def as_integers(self) -> tuple[int, ...]:
        """Everything but the samples, as compiled passes take it."""
        return (*self.shape[1:], *self.size, *self.kernel, *self.stride, *self.padding)


@dataclass(frozen=True)
class Unpooled:
    """Where the maximum of each window was.

    Attributes:
        taps: uint8 ``(N, *out, C)``, row-major within a window.
        windows: The windows.
    """

    taps: Tensor
    windows: Windows


@dataclass(frozen=True)
class Term:
    """``factor · kept(values)``.

    Attributes:
        values: float32 or bfloat16, canonical, contiguous.
        factor: float32 ``(C,)``, or None for 1.
        mask: Elements to keep, all others count as 0; None keeps all.
        unpooled: The values are those of windows, to be put where their maxima were, and added there; or None.
        version: Of ``values`` when the term was made, see ``version_of``.
    """

    values: Tensor
    factor: Tensor | None = None
    mask: Mask | None = None
    unpooled: Unpooled | None = None
    version: int = -1

    def __post_init__(self) -> None:
        if self.version < 0:
            object.__setattr__(self, "version", version_of(self.values))

    @property
    def shape(self) -> torch.Size:
        """Canonical: ``(N, *spatial, C)``."""
        return self.values.shape if self.unpooled is None else torch.Size(self.unpooled.windows.shape)

    @property
    def is_gradient(self) -> bool:
        """Whether the term has a mask or is unpooled."""
        return self.mask is not None or self.unpooled is not None

    @property
    def is_plain(self) -> bool:
        """Whether the term is its values."""
        return self.factor is None and not self.is_gradient


class Expression:
    """The sum of one or two terms and an offset, rectified or not; computed in float32, in memory as its terms are.

    Args:
        terms: What is added; all of one shape and dtype, and only the first may have a mask or be unpooled.
        offset: float32 ``(C,)``, or None for 0.
        rectified: Whether negative sums become 0.
        upper: What larger sums become then; NaN for no bound.
        mask: To be filled when the rectified sum is computed.
        kept: Whether whoever computes this keeps its values too, because they are likely to be wanted again.
        summed: Whether whoever quantizes this sums its channels too, because somebody will want that.
        sums: Those sums, see ``channel_sums``; None where nobody has computed them along with something else.
        moments: float64 ``(2, C)``: mean and biased variance of each channel; None where nobody has computed them yet.
    """

    def __init__(
        self,
        terms: tuple[Term, ...],
        offset: Tensor | None = None,
        rectified: bool = False,
        upper: float = nan,
        mask: Mask | None = None,
        kept: bool = False,
        moments: Tensor | None = None,
    ) -> None:
        assert 1 <= len(terms) <= 2
        assert all(t.values.is_contiguous() and t.values.dtype == terms[0].values.dtype for t in terms)
        self.terms = terms
        self.offset = offset
        self.rectified = rectified
        self.upper = upper
        self.mask = mask
        self.kept = kept
        self.summed = False
        self.moments = moments
        self.sums: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Canonical: ``(N, *spatial, C)``."""
        return self.terms[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """float32 or bfloat16."""
        return self.terms[0].values.dtype

    @property
    def device(self) -> torch.device:
        """Where it is to be computed."""
        return self.terms[0].values.device

    @property
    def is_term(self) -> bool:
        """Whether it is one term and nothing else."""
        return len(self.terms) == 1 and self.offset is None and not self.rectified

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing left to compute."""
        return self.is_term and self.terms[0].is_plain

    def values(self) -> Tensor:
        """Its values, canonical; computed once."""
        if not self.is_plain:
            self.computed(passes().evaluate(self))
        return self.checked().terms[0].values

    def computed(self, values: Tensor) -> None:
        """Take over values that a pass has computed along with something else."""
        self.terms, self.offset, self.rectified = (Term(values),), None, False

    def checked(self) -> Expression:
        """Itself.

        Raises:
            RuntimeError: A tensor that it reads was changed in place since.
        """
        for term in self.terms:
            if term.version != version_of(term.values):
                raise RuntimeError(
                    "a tensor was modified in place after it was added to, normalized or rectified, and before the "
                    "result was used; convert the model with fuse=False, or modify a copy"
                )
        return self

    def rectify(self, mask: Mask | None, upper: float) -> Expression:
        """Its positive part.

        Args:
            mask: To be filled with what is kept; None where nobody asks.
            upper: Bound of the result, NaN for none.
        """
        if self.rectified:
            self.values()
        rectified = Expression(self.terms, self.offset, True, upper, mask, self.kept)
        if mask is not None:
            mask.expression = rectified
        return rectified

    def plus(self, other: Expression) -> Expression:
        """The sum; what does not fit one walk is computed first."""
        for part in sorted((self, other), key=lambda e: len(e.terms), reverse=True):
            if part.rectified or len(self.terms) + len(other.terms) > 2:
                part.values()
        if any(t.is_gradient for t in self.terms) and any(t.is_gradient for t in other.terms):
            other.values()
        terms = sorted((*self.terms, *other.terms), key=lambda t: not t.is_gradient)
        offsets = [e.offset for e in (self, other) if e.offset is not None]
        return Expression(tuple(terms), sum(offsets[1:], offsets[0]) if offsets else None)

    def channel_sums(self) -> Tensor:
        """float64 ``(C,)`` sums over all but the channels."""
        return passes().channel_sums(self, None, None)[0] if self.sums is None else self.sums


def values_of(x: Tensor | Expression) -> Tensor:
    """The tensor itself, or the expression's values."""
    return x.values() if isinstance(x, Expression) else x


def passes() -> Any:
    """The compiled passes over expressions; there are no expressions where they cannot be imported."""
    return compiled_pass("evaluation")


def pooling() -> Any:
    """The compiled maximum over windows, likewise."""
    return compiled_pass("pooling")


def normalization() -> Any:
    """The compiled vectors of a batch norm, likewise."""
    return compiled_pass("normalization")


def version_of(values: Tensor) -> int:
    """Number of changes in place; tensors of inference mode do not count them."""
    return 0 if values.is_inference() else values._version
