"""Encoding slide images."""
