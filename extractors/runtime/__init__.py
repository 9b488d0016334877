"""Jobs of extractors: shards, cache of outputs, prefetching, batches, precision."""
