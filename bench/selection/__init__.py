"""One selection: seconds and memory on the CPU, and a new slide on a GPU."""
