import tomllib
from pathlib import Path

from frontend_backend.release import RELEASE


def test_the_release_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == RELEASE
