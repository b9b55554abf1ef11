"""What the test rig raises when it cannot do its work."""


class RigError(RuntimeError):
    """The rig, not Sealane, failed: no kernel to boot, no network to fetch one, a guest that never came up.

    Kept apart from `SealaneError`, so that no test mistakes the one for the other.
    """
