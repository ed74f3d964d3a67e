"""The factory's side of an update: bundles, deltas, signed metadata, where they are published, who gets them when."""
