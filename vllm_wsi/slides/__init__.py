"""A slide as data: NumPy and files, no model, no vLLM."""

from .feature_file import FeatureFile, write_features
from .formats.dispatch import features_in_memory, open_features
from .identity import SlideIdentity

__all__ = ["FeatureFile", "SlideIdentity", "features_in_memory", "open_features", "write_features"]
