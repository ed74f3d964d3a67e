"""What the TUF conformance suite drives; `make conformance TUF_CONFORMANCE=checkout` runs it."""
