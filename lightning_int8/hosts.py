"""Lightning is one code base under two names; a plugin must be a subclass of both to be taken by either."""

from __future__ import annotations

import importlib
import importlib.util

from lightning_utilities.core import rank_zero


def twin(package: str, module: str, name: str) -> tuple[type, ...]:
    """A class of the other package, in a tuple to inherit from; empty where that is not installed.

    A Trainer (a Fabric) takes plugins and callbacks of its own package only, and which of the two packages the user
    imports is known only when it is too late to choose.

    Args:
        package: "pytorch_lightning", twin of ``lightning.pytorch``, or "lightning_fabric", of ``lightning.fabric``.
        module: Where the class is, such as "plugins.precision".
        name: Name of the class.
    """
    if importlib.util.find_spec(package) is None:
        return ()
    log = rank_zero.log
    found = getattr(importlib.import_module(f"{package}.{module}"), name)
    # Both packages share this logger, and the import took it over.
    rank_zero.log = log
    return (found,)
