"""Lightning is one code base under two names; a plugin must be a subclass of both to be taken by either."""

from __future__ import annotations

import importlib
import importlib.util

from lightning_utilities.core import rank_zero


def twin_precision(package: str) -> tuple[type, ...]:
    """``Precision`` of ``package``'s plugins, in a tuple to inherit from; empty where it is not installed.

    A Trainer (a Fabric) takes plugins of its own package only, and which of the two packages the user imports is known
    only when it is too late to choose.

    Args:
        package: "pytorch_lightning", twin of ``lightning.pytorch``, or "lightning_fabric", of ``lightning.fabric``.
    """
    if importlib.util.find_spec(package) is None:
        return ()
    log = rank_zero.log
    module = importlib.import_module(f"{package}.plugins.precision")
    # Both packages share this logger, and the import took it over.
    rank_zero.log = log
    return (module.Precision,)
