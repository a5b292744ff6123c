"""Training steps: seconds and memory."""
