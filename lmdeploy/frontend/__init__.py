"""Text to tokens and back: what lies between the public interfaces and the engine."""
