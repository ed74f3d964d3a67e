"""The gateway for devices: it serves the published repository, takes reports and enrolments, and answers operators' questions.

It is a process of its own, because it must not share one with the keys that sign updates. It holds no key and decides nothing:
devices obey signed policies only, and whoever decides verifies the reports again. Start it with `ferry gateway`.
"""
