"""Measuring the engine: workloads of token ids, runs, and what they say."""
