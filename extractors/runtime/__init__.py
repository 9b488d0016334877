"""Running an extraction job: shards, cache, prefetch, device."""
