"""Executors: where the ranks of the model run (this process, child processes, a Ray cluster)."""
