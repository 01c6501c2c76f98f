"""docs/compatibility.md and docs/clients.md tell of programs that are installed and of tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "e2e"
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
CLIENTS = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")


def rows_of_programs() -> list[list[str]]:
    table = COMPATIBILITY.split("## Programs")[1].split("## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_each_program_of_the_table_is_installed_by_dev_and_has_a_test() -> None:
    listed = re.search(r"PACKAGES=\((.*?)\n?\)\n", (ROOT / "dev").read_text(encoding="utf-8"), re.DOTALL)
    assert listed is not None
    packages = set(re.sub(r"#.*", "", listed.group(1)).split())
    rows = rows_of_programs()
    assert len(rows) > 10
    for program, package, _, _, test in rows:
        named = set(re.findall(r"`([^`]+)`", package))
        assert named <= packages, f"{program}: ./dev does not install {named - packages}"
        assert named or package.startswith("PyPI"), f"{program} comes from nowhere"
        for name in re.findall(r"`([^`]+)`", test):
            assert (TESTS / name).is_file(), f"{program}: {name}"


def test_each_test_of_clients_is_in_the_table() -> None:
    named = set(re.findall(r"`(test_e2e_[a-z0-9_]+\.py)`", COMPATIBILITY))
    assert {path.name for path in TESTS.glob("test_e2e_clients_*.py")} <= named


def test_what_the_recipes_set_is_what_the_tests_set() -> None:
    told = set(re.findall(r"\b(T(?:PM|SS|CSD)[A-Z0-9_]+|DBUS_[A-Z_]+)\b", CLIENTS))
    assert len(told) > 12
    files = [*TESTS.glob("test_e2e_clients_*.py"), ROOT / "tests" / "clients_rig.py"]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    assert {name for name in told if name not in code} == set()
