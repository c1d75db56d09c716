"""The proxy: one address for many servers. It knows its nodes, picks one for each request, and passes bytes through."""
