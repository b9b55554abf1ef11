"""The attacker of the attack lab: what somebody on the wire can do with what the wire shows.

It works on captures and on connections, and knows what is public: QEMU's stream (`sealane.wire`), and the outside of Sealane's
connections as docs/protocol.md draws it, read with code of its own. It never imports the rooms that make keys, seal, or run a
host (import-linter holds that), so that it cannot know more than an attacker does.

Where hosts are simulated for it to attack is `sealane.testing.lab`.
"""
