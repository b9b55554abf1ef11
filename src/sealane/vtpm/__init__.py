"""A VM's own TPM: what it is kept under, how it travels, and the process that stands between QEMU and swtpm."""
