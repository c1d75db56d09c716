"""The HTTP server: what clients ask in the OpenAI form and others, answered by the engine."""
