"""What tests, demonstrations and measurements run on: guest images, QEMU binaries, simulated hosts, a wiretap.

Shipped with Sealane, so that whoever doubts a claim can repeat it. `python -m sealane.testing setup` prepares all of it.
"""
