"""Tests, flat: one file for each part, named after it. `make test` runs all but those marked slow."""
