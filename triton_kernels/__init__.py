"""Selection kernels: score every patch of a slide and keep the best k. Imported as `vllm_wsi.kernels`.

`cuda.py` and what it imports need Triton, and are imported where a GPU first calls them.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is `vllm_wsi.kernels`; under the name `triton_kernels` it would shadow Triton's own "
        "package for vLLM, so take the folder that holds it off sys.path"
    )

from .blocks import block_rows, map_blocks
from .op import ScoredTopK, gpu_vectors, score_topk
from .reference import ScorerWeights, score_patches, select_topk

__all__ = [
    "ScoredTopK", "ScorerWeights", "block_rows", "gpu_vectors", "map_blocks", "score_patches", "score_topk",
    "select_topk",
]  # fmt: skip
