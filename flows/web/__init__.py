"""The web application of the factory: MLflow's webhooks and the page for raters, on Starlette.

The gateway for devices will be another process, because it must not share one with the keys that sign updates.
"""
