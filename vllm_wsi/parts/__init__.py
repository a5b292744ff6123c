"""Real parts that others made: a language model, a patch encoder, slide images; fetched once, checked by sha256."""
