"""Updates of devices: bundle manifests, the delta codec, the agent on the device, and the factory's release tools."""

__version__ = "0.3.0"
