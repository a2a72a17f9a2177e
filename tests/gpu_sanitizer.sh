#!/usr/bin/env bash
# The small GPU tests under compute-sanitizer: memcheck, then racecheck. Needs a GPU and the CUDA toolkit's tool.
set -u
cd "$(dirname "$0")/.."
command -v compute-sanitizer > /dev/null || {
  echo "compute-sanitizer is missing: it comes with the CUDA toolkit (cuda-sanitizer)" >&2
  exit 2
}
python=${PYTHON:-python}
# Torch's cache hands out pieces of large allocations, in which an index out of bounds would not be seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
status=0
for tool in memcheck racecheck; do
  echo "+ $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
    "$python" -m pytest -m gpu tests/test_cupy_backend.py tests/test_gpu.py \
    -k "contract or planes or streams or matrix_product" || status=1
done
exit $status
