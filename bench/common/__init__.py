"""What several benchmarks need: where rows go, tables of a page, and what a server uses."""
