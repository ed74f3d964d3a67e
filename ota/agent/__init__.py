"""The device's agent: verifies, applies, tries out and, if need be, takes back updates; and draws images meanwhile.

disk        all writes, durable and in order
state       the agent's directory and its one state file
rules       every decision, without I/O
transport   fetching from a folder or over HTTP, with resume
trust       signed metadata, by python-tuf's client
graph       what a bundle's graph may ask the runtime to read
sampler     images from a model, in NumPy, driven by sampler.json
child       what runs in a process of its own: applying, trying, generating
reports     the signed, bounded queue of reports
updater     the twelve steps of an update
cli         the command `ferry-agent`
"""
