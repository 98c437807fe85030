"""Sampling groups of completions from the policy, with the log-probs they were drawn with."""
