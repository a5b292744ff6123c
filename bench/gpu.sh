#!/usr/bin/env bash
# On any CUDA machine: the kernel tests on the GPU itself, then the benchmark, its plot, and the time of a new slide;
# where vLLM is installed, serving at the shape of Qwen2.5-7B, with weights that need no download.
# Rows go to bench/results/kernels.csv, or to $CSV, and to cold_slide.csv and serving.csv beside it; so does the plot.
# Arguments go to bench/kernels/score_topk.py.
# Needs torch, triton, pytest, pytest-benchmark and pytest-timeout, for the plot matplotlib; FlashInfer and vLLM are
# measured where they are installed. Run from the repository root with the project importable.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
CSV=${CSV:-bench/results/kernels.csv}
"$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.cuda.get_device_name())"
"$PYTHON" -m pytest -q tests/kernels/interpreted tests/kernels/test_cuda.py
"$PYTHON" -m bench.kernels.score_topk --csv "$CSV" "$@"
"$PYTHON" -m bench.kernels.plot_score_topk "$CSV" || echo "gpu.sh: no plot; $CSV holds all rows"
"$PYTHON" -m bench.selection.cold_slide --csv "$(dirname "$CSV")/cold_slide.csv"
if "$PYTHON" -c "import vllm" 2>/dev/null; then
    "$PYTHON" -m bench.serving.throughput --decoder qwen2.5-7b --csv "$(dirname "$CSV")/serving.csv"
else
    echo "gpu.sh: vLLM is not installed; serving is left out"
fi
