"""The algorithm: rewards -> advantages -> packed batches -> objective -> update."""
