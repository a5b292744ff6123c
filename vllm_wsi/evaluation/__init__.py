"""Question sets, benchmarks and reports: what a slide language model answers, and what it was shown."""
