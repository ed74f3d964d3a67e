"""The way to the device, and the device: bundle manifests, the delta codec, the agent, and the factory's release tools."""

__version__ = "0.1.0"
