"""Item-item similarity: exact, approximate and incremental top-k neighbours."""
