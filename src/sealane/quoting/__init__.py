"""The quoting process: it measures what takes part in migrations, and has the host's roots of trust sign for enclaves."""
