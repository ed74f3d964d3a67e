"""The tests: one file for each part of the program, named after it. `make test` runs all tests but those marked slow."""
