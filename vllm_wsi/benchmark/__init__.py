"""Benchmarks of slide questions: what a served model answers, and how that is scored."""
