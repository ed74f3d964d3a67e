"""The migrations; a file name begins with the version that it leads to."""
