"""Selection kernels: score every patch of a slide and keep the best k. Imported as `vllm_wsi.kernels`."""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is `vllm_wsi.kernels`; under the name `triton_kernels` it would shadow Triton's own "
        "package for vLLM, so take the folder that holds it off sys.path"
    )

from .reference import ScorerWeights, TopK, score_patches, score_topk

__all__ = ["ScorerWeights", "TopK", "score_patches", "score_topk"]
