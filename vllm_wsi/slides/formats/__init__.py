"""Readers of feature files, one for each kind of file."""
