"""Generated sample dataset with known ground truth."""
