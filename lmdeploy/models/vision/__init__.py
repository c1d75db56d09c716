"""Vision encoders: tiles of pictures to embeddings in the decoder's space."""
