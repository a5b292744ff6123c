"""What a selection is worth: one checkpoint under many rules of selection."""
