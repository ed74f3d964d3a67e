"""Make the documentation's pages that are generated from the program. MkDocs calls `hooks`; nothing of it is installed."""
