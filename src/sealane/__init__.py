"""Sealane moves running KVM/QEMU virtual machines between hosts through a sealed lane."""

__version__ = "0.1.0"
