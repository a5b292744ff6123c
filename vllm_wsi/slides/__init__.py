"""A slide as data: NumPy and files, no model, no vLLM."""

from .feature_file import FeatureFile, SlideError, SlideIdentity, write_features
from .formats.dispatch import features_in_memory, open_features

__all__ = ["FeatureFile", "SlideError", "SlideIdentity", "features_in_memory", "open_features", "write_features"]
