"""How a forward runs: length buckets, compiled and recomputed blocks, the fp32 head, uneven processes, experts."""
