"""The benchmarks; README.md beside this file says what each measures. They run as modules, from the repository root."""
