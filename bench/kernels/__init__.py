"""Scoring and Top-K on a GPU, against what people run today."""
