"""The engine's bookkeeping: pure Python and numpy, no torch."""
