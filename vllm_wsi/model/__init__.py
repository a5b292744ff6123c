"""The checkpoint: its configuration, its model in transformers, and its prompts."""
