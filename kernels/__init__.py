"""The CUDA kernels, one per ``.cu`` file; none has been added yet."""
