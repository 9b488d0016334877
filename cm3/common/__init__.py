"""What every stage of the pipeline shares: table contracts, atomic files, the command line, progress, strict config."""
