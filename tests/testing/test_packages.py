"""Package sources: ours are derived from the machine's, in both of apt's formats."""

from sealane.testing.packages import derive_sources

DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 xyz

Types: deb
URIs: http://other.example/tool
Suites: nodistro
Components: main

Types: deb
URIs: http://mirror.example/debian
Suites: bookworm
Enabled: no
"""


def test_deb822_keeps_keys_and_adds_backports() -> None:
    derived = derive_sources(DEB822, codename="bookworm", deb822=True)
    assert derived == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates bookworm-backports\n"
        "Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
        "Types: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n xyz\n"
    )


def test_one_line_format() -> None:
    derived = derive_sources(
        "deb [signed-by=/k.gpg arch=amd64] http://mirror.example/debian bookworm main contrib # note\n"
        "deb-src http://mirror.example/debian bookworm main\n"
        "# deb http://mirror.example/debian bookworm main\n"
        "deb http://mirror.example/debian bookworm-updates main\n"
        "deb http://other.example/tool stable main\n",
        codename="bookworm",
        deb822=False,
    )
    assert derived.splitlines() == [
        "deb [signed-by=/k.gpg arch=amd64] http://mirror.example/debian bookworm main contrib",
        "deb [signed-by=/k.gpg arch=amd64] http://mirror.example/debian bookworm-backports main contrib",
        "deb http://mirror.example/debian bookworm-updates main",
        "deb http://other.example/tool stable main",
        "deb http://other.example/tool stable-backports main",
    ]
