"""Pictures on their way to a model: loading, preparing, and where they stand in a prompt."""
