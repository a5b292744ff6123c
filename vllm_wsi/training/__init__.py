"""Training: the soft path of SparseLearn, from question files to a checkpoint that `vllm serve` takes."""
