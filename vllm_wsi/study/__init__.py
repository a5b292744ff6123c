"""What a selection is worth: one checkpoint under many selection policies."""
