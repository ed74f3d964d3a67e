"""Flows: the order of the steps, retries, schedules, and the command `ferry`; `model`, `registry` and `ota` do the steps."""
