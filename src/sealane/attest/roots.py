"""The vendors' root keys, pinned: SHA-256 over the root certificate's SubjectPublicKeyInfo.

Nothing else is a production root. A reference file can name test roots; what rests on one never counts as production.
"""

from typing import Final

INTEL: Final = "Intel SGX Root CA"

INTEL_ROOTS: Final = {"a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e": INTEL}

# ARK: AMD Root Key, one for each generation (AMD 57230, 3.1).
AMD_ROOTS: Final = {
    "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9": "ARK-Milan",
    "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831": "ARK-Genoa",
    "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08": "ARK-Turin",
}
