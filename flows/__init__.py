"""Order, retries, schedules and the command `ferry`; what is done at each step lives in `model`, `registry` and `ota`."""
