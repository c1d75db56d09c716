"""Weight files (safetensors and GGUF) behind one face: :func:`lmdeploy.weights.checkpoint.open_checkpoint`."""
