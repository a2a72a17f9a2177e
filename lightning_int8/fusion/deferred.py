"""A tensor whose values are computed when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_int8.backends.cpu.arrays import FLOAT_DTYPES
from lightning_int8.backends.cpu.expression import Expression, Term

_FUSED: dict[Callable[..., Any], Callable[..., Any]] = {}

_CPU = torch.device("cpu")

_NEED_STORAGE = {
    Tensor.__array__,
    Tensor.__deepcopy__,
    Tensor.__dlpack__,
    Tensor.__reduce_ex__,
    Tensor.__repr__,
    Tensor.data_ptr,
    Tensor.numpy,
    Tensor.share_memory_,
    Tensor.storage,
    Tensor.tolist,
    Tensor.untyped_storage,
}
"""What reads memory without asking the dispatcher."""


def fuses(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let the decorated function stand for torch's ``functions`` where an argument is deferred.

    It takes their arguments, and returns NotImplemented where torch's own function must compute.
    """

    def register(fused: Callable[..., Any]) -> Callable[..., Any]:
        _FUSED.update(dict.fromkeys(functions, torch.compiler.disable(fused)))
        return fused

    return register


class Deferred(Tensor):
    """A tensor ``(N, C, *spatial)``, float32 or bfloat16, that is an expression until its values are needed.

    Python calls of functions that ``fuses`` knows extend the expression; every other operation, autograd's own among
    them, reaches ``__torch_dispatch__``, which computes the values and calls torch with a plain tensor. From then on
    that plain tensor is the truth: views of it and changes in place are seen here.

    Args:
        expression: Canonical.
        channels_last: Memory format of the plain tensor.
    """

    _expression: Expression | None
    _plain: Tensor | None
    channels_last: bool

    @staticmethod
    def __new__(cls, expression: Expression, channels_last: bool) -> Deferred:  # noqa: D102 - see the class
        batch, *spatial, channels = expression.shape
        shape = (batch, channels, *spatial)
        if channels_last:
            outer, *rest, innermost = _contiguous_strides(expression.shape)
            strides = (outer, innermost, *rest)
        else:
            strides = _contiguous_strides(shape)
        self = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=expression.dtype, device=_CPU)
        self._expression, self._plain, self.channels_last = expression, None, channels_last
        return self

    def source(self) -> Expression:
        """What is to be computed, canonical."""
        return canonical(self._plain) if self._expression is None else self._expression

    def defer(self, expression: Expression) -> None:
        """Become another expression, as an operation in place does."""
        assert self._plain is None
        self._expression = expression

    @property
    def is_computed(self) -> bool:
        """Whether somebody has seen the values, as a plain tensor that may be viewed or changed."""
        return self._plain is not None

    @torch.compiler.disable
    def plain(self) -> Tensor:
        """The tensor with its values, without history."""
        if self._plain is None:
            assert self._expression is not None
            values = self._expression.values().movedim(-1, 1)
            self._plain = values if self.channels_last else values.contiguous()
            self._expression = None
        return self._plain

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FUSED:
                result = _FUSED[func](*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if func in _NEED_STORAGE:
                args = tree_map(_with_history, args)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out the function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.add.Tensor and not kwargs and all(is_fusable(a, args[0]) for a in args):
            # Autograd adds the gradients of a tensor that was used twice.
            return canonical(args[0]).plus(canonical(args[1])).values().movedim(-1, 1)
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = args[place] if place < len(args) else kwargs.get(argument.name)
                    for tensor in tree_leaves(written):
                        if isinstance(tensor, Deferred):
                            tensor._make_private()
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))

    def _make_private(self) -> None:
        """Before a change in place: values that an expression elsewhere may read stay as they are."""
        if not self.is_computed:
            self._plain = self.plain().clone(memory_format=torch.preserve_format)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))


def canonical(tensor: Tensor | None) -> Expression:
    """A tensor ``(N, C, *spatial)`` as an expression with nothing left to compute."""
    assert tensor is not None
    if isinstance(tensor, Deferred):
        return tensor.source()
    return Expression((Term(tensor.detach().movedim(1, -1).contiguous()),))


def plain_term(gradient: Tensor) -> Term:
    """A gradient ``(N, C, *spatial)`` as one term without factors."""
    expression = canonical(gradient)
    if not expression.is_term or expression.terms[0].factor is not None:
        expression.values()
    return expression.terms[0]


def is_fusable(tensor: Any, other: Any) -> bool:
    """Whether two arguments can be parts of one expression, as far as the first one tells."""
    return is_alike(tensor, other) and tensor.shape == other.shape


def is_alike(tensor: Any, other: Any) -> bool:
    """Whether the first argument is a tensor that fused operations can read, of the dtype of the other one."""
    return (
        type(tensor) in (Tensor, nn.Parameter, Deferred)
        and isinstance(other, Tensor)
        and tensor.dtype == other.dtype
        and tensor.dtype in FLOAT_DTYPES
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def plain(value: Any) -> Any:
    """The plain tensor of a deferred one; everything else as it is."""
    return value.plain() if isinstance(value, Deferred) else value


def _with_history(value: Any) -> Any:
    """A plain tensor in the place of a deferred one, for autograd too."""
    return value.view_as(value) if isinstance(value, Deferred) else value
