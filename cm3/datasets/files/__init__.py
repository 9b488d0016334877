"""The user's own tables: Parquet, CSV, TSV and JSON Lines."""
