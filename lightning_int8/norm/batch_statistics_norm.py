"""What batch norms with other statistics or other arithmetic have in common with torch's: everything around it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_int8.norm.passes import statistics_dtype


class BatchStatisticsNorm(_BatchNorm):
    """A batch norm of torch in all but how a batch is normalised: modes, running statistics and errors are torch's.

    Subclasses are reached by swapping ``__class__`` and have no constructor of their own.
    """

    running_mean: Tensor | None
    running_var: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *spatial)`` to the same shape, dtype and memory format.

        Raises:
            ValueError: Wrong number of axes or channels, or one value per channel in training.
        """
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"input shape: {tuple(x.shape)} has {x.shape[1]} channels, not {self.num_features}")
        if not self.training and (self.running_mean is not None or self.running_var is not None):
            return self._normalize_frozen(x)
        group = self._process_group()
        if group is None and x.numel() <= self.num_features:
            # Torch's answer to an empty batch, and its error for a single value.
            return _BatchNorm.forward(self, x)
        y, mean, variance = self._normalize_batch(x, group)
        if self.training and self.track_running_stats:
            self._track(mean, variance)
        return y

    def _normalize_batch(self, x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise by the statistics of the batch, over the ranks of ``group``.

        Returns:
            The output; mean and variance, ``(C,)``, that running statistics follow.
        """
        raise NotImplementedError

    def _normalize_frozen(self, x: Tensor) -> Tensor:
        """Normalise by running statistics."""
        raise NotImplementedError

    def _process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share statistics, None for this process alone."""
        return None

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gamma and beta, ``(C,)``, in the dtype of statistics; 1 and 0 where the module has none."""
        dtype = statistics_dtype(x)
        gamma, beta = self.weight, self.bias
        return (
            x.new_ones(self.num_features, dtype=dtype) if gamma is None else gamma.to(dtype),
            x.new_zeros(self.num_features, dtype=dtype) if beta is None else beta.to(dtype),
        )

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics: by ``momentum``, or to the plain average of all batches where that is None."""
        factor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        for running, batch in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None:
                running.copy_(torch.lerp(running.to(batch.dtype), batch, factor))


class SyncedStatistics(BatchStatisticsNorm):
    """Shares statistics over ranks in training, as ``torch.nn.SyncBatchNorm`` does, on every device."""

    process_group: dist.ProcessGroup | None

    def _process_group(self) -> dist.ProcessGroup | None:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None
