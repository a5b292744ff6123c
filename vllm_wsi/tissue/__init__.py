"""Slides pooled from real labelled tissue, whose answers are known: to train on and to measure with."""
