"""The commands of `ferry`, a module for each group; `flows.cli` puts them together."""
