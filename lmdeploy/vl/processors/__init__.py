"""Pictures to tiles, one module per way of cutting them."""
