"""The client that the TUF conformance suite tests; `make conformance TUF_CONFORMANCE=checkout` runs the suite."""
