"""The device's agent: it verifies, applies, tries and, if necessary, rolls back updates, and draws images meanwhile.

disk        all durable writes to the agent's directory
state       the agent's directory and its one state file
rules       decisions about updates, without I/O
policy      whether policy 2 lets this device in, without I/O
variants    which variant draws, and when the expert routing has shifted, without I/O
network     rules about proxies, redirects, refusals and secrets in addresses, without I/O
line        connections to web servers and through proxies, which another thread can cut
transport   fetching from a folder or over HTTP, with resume
trust       signed metadata, checked by python-tuf's client
graph       what a bundle's graph may make the runtime read
runtime     whether ONNX Runtime computes correctly here
sampler     images from a model, in NumPy, driven by sampler.json
child       tasks in a separate process: applying, trying, generating
energy      joules per image from the device's sensors
bench       what an image costs here, by measurement
board       what kind of board this is
kit         a PoC kit: its documents and files, each checked before use
poc         what the candidates of a kit cost here, by measurement
measured    the stored figures of `bench`
counts      what is counted of the images that are drawn, by bundle
channel     the ways on which reports leave: a folder, or the factory's gateway
reports     the signed, bounded queue of reports, and what became of each
enroll      the device's enrolment with a token
beat        the heartbeat: when it is due, and what it says
plan        what an update installs and from what: release, delta or full bundle, downloads, room
slots       slots on disk: building one, verifying it, reporting what runs
trial       trying a bundle before it is trusted, probation, going back
acknowledgement  the wait until the factory has kept the report that a bundle starts
updater     the twelve steps of an update
drawing     an image on request, by the first bundle and variant that can
poll        regular checks for updates
serve       the local endpoint that draws for other programs
doctor      checks of the device
cli         the command `ferry-agent`
"""

import os

# ONNX Runtime from 1.29 on sends what it runs, with hashes of graph and weights, to its maker, unless this is set when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
