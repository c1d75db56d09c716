"""The forms in which models write their reasoning."""
