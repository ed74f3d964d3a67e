"""The gateway: what devices fetch and where they report, over HTTP, in a process of its own that reaches no signing key."""
