"""Drivers for hypervisors: QEMU over QMP, and the launch of a QEMU that waits for a migration."""
