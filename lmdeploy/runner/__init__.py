"""One rank's device side: from a plan to sampled tokens."""
