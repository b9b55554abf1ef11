"""The TM-Enclave: one process per migration that holds the keys and pumps the bytes."""
