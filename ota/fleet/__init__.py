"""The fleet as the factory knows it: which devices are enrolled, what they reported, and how they stand."""
