"""Training: loop, checkpoints, schedule, warm start."""
