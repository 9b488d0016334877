"""Tables of your own: Parquet, CSV, TSV and JSON Lines."""
