"""Statistics behind the reports: runs, paired tests, slices, findings."""
