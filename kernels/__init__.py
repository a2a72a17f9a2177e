"""The CUDA kernels, one per ``.cu`` file, and what compiles and launches them.

A product is put together from four parts, each in a header of its own: *sources* say where the pieces of an operand lie
in memory (``sources.cuh``, ``conv_sources.cuh``), a *family* multiplies tiles of them (``wgmma.cuh``, ``imma.cuh``,
``dp4a.cuh``), the *epilogue* turns sums into the result (``epilogue.cuh``, ``split_sums.cuh``), and a ``.cu`` file
joins them.

On the Python side ``gemm``, ``convolution``, ``quantize`` and ``reductions`` fill in the structures that kernels take
(``parameters``) and launch them on a ``device.Device``; ``variants`` chooses family and tile; ``build`` and ``nvrtc``
make machine code of the sources, and ``cuda_device`` runs it through CuPy. ``operators`` makes operators of torch of
them all. Nothing here needs a GPU, CuPy or a compiler before the first launch.
"""
