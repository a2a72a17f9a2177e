"""Batch norm, ReLU, addition and pooling between two INT8 convolutions, without tensors of their own.

A convolution returns a ``Deferred`` tensor: a tensor for autograd, hooks and user code, which remembers what is to be
computed. The operations in this folder add to that memory instead of walking through memory; whoever else looks at the
tensor gets its values. Importing the folder registers them.
"""

from lightning_int8.fusion import addition, average_pool, batch_norm, concatenation, max_pool, relu
from lightning_int8.fusion.deferred import Deferred

__all__ = ["Deferred", "addition", "average_pool", "batch_norm", "concatenation", "max_pool", "relu"]
