"""Which patches of a slide are kept: scorer, selector and their baselines. Runs in training and in service."""
