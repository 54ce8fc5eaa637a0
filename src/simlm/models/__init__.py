"""Models: encoder backbones, bi-encoder, cross-encoder."""
