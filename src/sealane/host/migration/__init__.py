"""One migration at either end: the enclave it runs in, what the agents say to each other, and the two jobs."""
