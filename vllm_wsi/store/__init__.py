"""Finished selections on disk: a slide is scored once in its life."""
