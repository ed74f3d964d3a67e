"""Which model is best, and the record of it: the gate, MLflow's catalogue, the ledger of decisions, the one-page report."""
