"""A small checkpoint with random weights for features of the built-in encoder."""

from vllm_wsi.encoding.encoders import load_encoder
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings


def write_checkpoint(path, feature_dim=None, encoder=None, k=4):
    known = load_encoder("colour-texture")
    settings = TinySettings(
        feature_dim=feature_dim or known.feature_dim,
        encoder=encoder or known.id,
        hidden_size=64,
        num_layers=1,
        num_slide_tokens=k,
    )
    init_checkpoint(path, settings)
    return path
