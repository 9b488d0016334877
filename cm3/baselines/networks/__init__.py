"""Networks of the baselines in PyTorch, one a file; `layers` has what they share."""
