"""The factory's side of an update: bundles, deltas, signed metadata, publishing, rollouts and device reports."""
