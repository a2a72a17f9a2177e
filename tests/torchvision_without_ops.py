"""Lets torchvision be imported where its compiled operators do not fit torch, as a CUDA wheel beside a CPU build.

Without them ``import torchvision`` fails, and with it timm and, where torchvision is installed, lightning. The models
that the tests train use none of these operators, so it is enough that they are declared.
"""

import importlib.util
import sys

import torch


def declare_missing_operators():
    """Import torchvision; where that fails for want of an operator, declare it and import again."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision
    except RuntimeError:
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        return library
    return None


LIBRARY = declare_missing_operators()  # the declarations live as long as this object
