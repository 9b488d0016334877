"""The DAG: the config model, the plan of paths and keys, and the Snakemake rules."""
