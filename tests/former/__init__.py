"""The version before: its programs, a workspace that it made, and a device that its agent set up. README.md says what they are for."""
