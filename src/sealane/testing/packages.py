"""Debian packages, fetched and unpacked beside the system without installing them.

The rig needs a kernel to boot (no host kernel is readable everywhere) and, on Debian 12, a QEMU newer than the
system's: 7.2 loses dirty pages under TCG. Both come from the machine's own package sources, through an apt whose lists
and caches are private; nothing on the system changes and no privilege is needed.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from sealane.testing.cache import build_once
from sealane.testing.problems import RigError

KERNEL_VARIABLE = "SEALANE_KERNEL"
_QEMU_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
_LIBVIRT_PACKAGES = (
    "libvirt0",
    "libvirt-clients",
    "libvirt-common",
    "libvirt-daemon",
    "libvirt-daemon-common",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-log",
)
_FETCH_TIMEOUT_S = 300
_LIBRARY = re.compile(r"(?!.*-(data|common|modules|runtime|bin|base)\b)(lib|zlib)[a-z0-9.+-]+")


def release() -> tuple[str, str]:
    """The distribution's id and the code name of its release, such as `debian`, `bookworm`."""
    fields = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), re.MULTILINE))
    return fields.get("ID", ""), fields.get("VERSION_CODENAME", "")


def kernel() -> Path:
    """A kernel image for the guests: SEALANE_KERNEL, or the one that Debian's `linux-image-cloud-amd64` stands for."""
    named = os.environ.get(KERNEL_VARIABLE)
    if named:
        return Path(named)
    directory = build_once(f"kernel-{_debian_release()}", _fetch_kernel)
    return directory / "vmlinuz"


def private_qemu() -> Path:
    """A `qemu-system-x86_64` from Debian's backports, unpacked into the cache; it finds its firmware by itself."""
    directory = build_once(f"qemu-{_debian_release()}-backports", lambda made: _fetch_backports(made, _QEMU_PACKAGES))
    return directory / "usr/bin/qemu-system-x86_64"


def private_libvirt() -> Path:
    """The root directory of a libvirt from Debian's backports, unpacked into the cache: `usr/sbin/libvirtd` and all that it has."""
    return build_once(f"libvirt-{_debian_release()}-backports", lambda made: _fetch_backports(made, _LIBVIRT_PACKAGES))


def unpacked(name: str, packages: Sequence[str]) -> Path:
    """These packages and the libraries that they need, unpacked below one directory of the cache, which is called `name`."""
    return build_once(f"{name}-{_debian_release()}", lambda made: _fetch_all(made, packages))


def derive_sources(text: str, *, codename: str, deb822: bool) -> str:
    """Of one file of package sources the entries for this release, each followed by its backports."""
    return "\n".join(_deb822_sources(text, codename) if deb822 else _line_sources(text, codename))


def _debian_release() -> str:
    distribution, codename = release()
    if distribution != "debian" or platform.machine() != "x86_64":
        raise RigError(
            f"the rig fetches kernels and QEMU on Debian for x86-64 only, and here is {distribution} on"
            f" {platform.machine()}: set {KERNEL_VARIABLE} and SEALANE_QEMU to a kernel image and a QEMU"
        )
    return codename


def _suites_here(suites: list[str], codename: str) -> list[str]:
    return [suite for suite in suites if re.fullmatch(rf"({re.escape(codename)}|stable)(-\w+|/updates)?", suite)]


def _with_backports(suites: list[str]) -> list[str]:
    mains = [suite for suite in suites if re.fullmatch(r"\w+", suite)]
    return list(dict.fromkeys(suites + [f"{main}-backports" for main in mains]))


def _deb822_sources(text: str, codename: str) -> Iterator[str]:
    for stanza in re.split(r"\n[ \t]*\n", text):
        lines = [line for line in stanza.splitlines() if not line.startswith("#")]
        fields = {line.partition(":")[0].lower(): line.partition(":")[2].split() for line in lines if line[:1].strip()}
        suites = _suites_here(fields.get("suites", []), codename)
        if not suites or "deb" not in fields.get("types", []) or fields.get("enabled") == ["no"]:
            continue
        replaced = {"suites": " ".join(_with_backports(suites)), "types": "deb"}
        for line in lines:
            name = line.partition(":")[0].lower()
            yield f"{name.title()}: {replaced[name]}" if name in replaced else line
        yield ""


def _line_sources(text: str, codename: str) -> Iterator[str]:
    for line in text.splitlines():
        match = re.fullmatch(r"\s*deb\s+(\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]*?)\s*(#.*)?", line)
        if match and _suites_here([match[3]], codename):
            for suite in _with_backports([match[3]]):
                yield f"deb {match[1] or ''}{match[2]} {suite} {match[4]}"


class _PrivateApt:
    """apt with its own sources, lists and caches below `root`."""

    def __init__(self, root: Path, codename: str) -> None:
        self._root = root
        for part in ("sources.list.d", "lists/partial", "cache/archives/partial"):
            (root / part).mkdir(parents=True)
        self._write_sources(codename)
        self._complaints = self._run("apt-get", "-q", "update")[1]

    def _write_sources(self, codename: str) -> None:
        etc = Path("/etc/apt")
        for path in (etc / "sources.list", *(etc / "sources.list.d").glob("*")):
            if path.suffix in {".list", ".sources"} and path.is_file():
                derived = derive_sources(path.read_text(), codename=codename, deb822=path.suffix == ".sources")
                (self._root / "sources.list.d" / path.name).write_text(derived + "\n")

    def _run(self, *argv: str) -> tuple[str, str]:
        settings = {
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": str(self._root / "sources.list.d"),
            "Dir::State::Lists": str(self._root / "lists"),
            "Dir::Cache": str(self._root / "cache"),
            "APT::Sandbox::User": "",  # the unprivileged user that root's apt changes to cannot reach a private cache
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "APT::Update::Error-Mode": "any",
        }
        options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        try:
            done = subprocess.run(
                [argv[0], *options, *argv[1:]],
                cwd=self._root,
                env=os.environ | {"LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_FETCH_TIMEOUT_S,
                check=False,
            )
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            raise RigError(f"{argv[0]} does not work here: {error}") from error
        return done.stdout, done.stderr if done.returncode else ""

    def depends(self, package: str) -> list[str]:
        """The packages that `package` depends on directly."""
        return re.findall(r"^\s+Depends: (\S+)$", self._run("apt-cache", "depends", package)[0], re.MULTILINE)

    def libraries(self, packages: Sequence[str]) -> list[str]:
        """The packages of libraries that these need, and that those need; no data, no tools."""
        told = self._run("apt-cache", "depends", "--recurse", "--important", *packages)[0]
        needs: dict[str, list[str]] = {}
        for name, needed in re.findall(r"^(\S+)$|^\s[ |]Depends: (\S+)$", told, re.MULTILINE):
            if name:
                latest = needs.setdefault(name, [])
            else:
                latest.append(needed)
        found, left = dict.fromkeys(packages), list(packages)
        while left:
            for needed in needs.get(left.pop(), []):
                if _LIBRARY.fullmatch(needed) and needed not in found:
                    found[needed] = None
                    left.append(needed)
        return [name for name in found if name not in packages]

    def unpack_all(self, packages: Sequence[str], into: Path) -> None:
        """As `unpack`, of many packages of this release at once."""
        complaints = self._run("apt-get", "-q", "download", *packages)[1]
        archives = list(self._root.glob("*.deb"))
        if len(archives) != len(packages):
            raise RigError(
                f"the Debian packages {' '.join(packages)} cannot be fetched: {complaints or self._complaints}"
            )
        for archive in archives:
            subprocess.run(["dpkg", "-x", archive, into], check=True, capture_output=True)
            archive.unlink()

    def unpack(self, package: str, into: Path) -> None:
        """Fetches one package (`name`, or `name/suite`) and unpacks its files below `into`."""
        complaints = self._run("apt-get", "-q", "download", package)[1]
        archives = list(self._root.glob(f"{package.partition('/')[0]}_*.deb"))
        if len(archives) != 1:
            raise RigError(f"the Debian package {package} cannot be fetched: {complaints or self._complaints}")
        subprocess.run(["dpkg", "-x", archives[0], into], check=True, capture_output=True)
        archives[0].unlink()


def _scratch(directory: Path) -> Path:
    """The work directory of one fetch: below the thing being built, so that it goes away with it."""
    path = directory / "work"
    path.mkdir()
    return path


def _fetch_kernel(directory: Path) -> None:
    work = _scratch(directory)
    apt = _PrivateApt(work / "apt", release()[1])
    images = [name for name in apt.depends("linux-image-cloud-amd64") if name.startswith("linux-image-")]
    apt.unpack(images[0] if images else "linux-image-cloud-amd64", work / "root")
    found = sorted((work / "root/boot").glob("vmlinuz-*"))
    if not found:
        raise RigError("the kernel package holds no vmlinuz")
    found[-1].rename(directory / "vmlinuz")
    (directory / "version").write_text(found[-1].name.removeprefix("vmlinuz-") + "\n")
    shutil.rmtree(work)


def _fetch_backports(directory: Path, packages: Sequence[str]) -> None:
    codename = release()[1]
    work = _scratch(directory)
    apt = _PrivateApt(work / "apt", codename)
    for package in packages:
        apt.unpack(f"{package}/{codename}-backports", directory)
    shutil.rmtree(work)


def _fetch_all(directory: Path, packages: Sequence[str]) -> None:
    work = _scratch(directory)
    apt = _PrivateApt(work / "apt", release()[1])
    apt.unpack_all([*packages, *apt.libraries(packages)], directory)
    shutil.rmtree(work)
