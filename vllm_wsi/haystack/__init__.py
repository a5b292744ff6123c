"""Virtual slides with known answers, and the checkpoint that was trained on them."""
