"""lmdeploy lite: quantising a model, layer by layer."""
