"""agent.toml and vms.toml: keys, defaults, and errors that name the line."""

from pathlib import Path

import pytest

from sealane.errors import SealaneError
from sealane.host.config import Settings, documented_keys, load_settings, load_vms


def test_defaults_file_command_line(tmp_path: Path) -> None:
    assert load_settings(tmp_path) == Settings()
    (tmp_path / "agent.toml").write_text('name = "a"\nport = 7\n[limits]\nstop_grace_s = 1.5\n')
    settings = load_settings(tmp_path, {"port": 9, "listen": None})
    assert (settings.name, settings.port, settings.listen, settings.limits.stop_grace_s) == ("a", 9, "::", 1.5)
    assert settings.limits.migrations_max == Settings().limits.migrations_max


def test_every_key_is_described() -> None:
    keys = list(documented_keys())
    assert all(description.endswith(".") for _, _, description in keys)
    assert {"name", "port", "limits.migrations_max"} <= {key for key, _, _ in keys}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("# hello\nname = 'a'\nprot = 1\n", 3, "unknown key prot"),
        ("port = 1\n\n[limits]\nmigrations_max = 0\n", 4, "limits.migrations_max"),
        ("port = 70000", 1, "port"),
        ("[limits]\nport = 3\n", 2, "unknown key limits.port"),
        ("[else]\nport = 3\n", 1, "unknown key else"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    (tmp_path / "agent.toml").write_text(text)
    with pytest.raises(SealaneError, match=rf"agent\.toml line {line}: .*{words}") as raised:
        load_settings(tmp_path)
    assert raised.value.code == "usage.configuration"


def test_broken_toml_and_overrides(tmp_path: Path) -> None:
    with pytest.raises(SealaneError, match=r"usage\.argument"):
        load_settings(tmp_path, {"port": -1})
    (tmp_path / "agent.toml").write_text("a = = b")
    with pytest.raises(SealaneError, match="line 1"):
        load_settings(tmp_path)
    (tmp_path / "agent.toml").write_bytes(b"\xff")
    with pytest.raises(SealaneError, match="UTF-8"):
        load_settings(tmp_path)


def test_vms(tmp_path: Path) -> None:
    path = tmp_path / "vms.toml"
    assert load_vms(path) == []
    path.write_text('[[vm]]\nname = "a"\nqmp = "/a"\n\n[[vm]]\nname = "b"\nqmp = "/b"\nlaunch_incoming = ["q"]\n')
    assert [(vm.name, vm.launch_incoming) for vm in load_vms(path)] == [("a", None), ("b", ["q"])]
    for broken, line in (("qmp = 'b'", 6), ("qmp = '/a'", 6), ("qmp = '/b'\nsize = 1", 7), ("", 4)):
        path.write_text(f"[[vm]]\nname = 'a'\nqmp = '/a'\n[[vm]]\nname = 'b'\n{broken}\n")
        with pytest.raises(SealaneError, match=rf"vms\.toml line {line}:"):
            load_vms(path)
