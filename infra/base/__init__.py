"""What the demo starts from, and how it was made."""
