"""Xen with everything in dom0: unmodified guests, two kinds of TPM, hot plug, and what a wrong uuid gets. One boot.

The scene is played once; each test then reads what was said in it. Longer ones: test_e2e_xen_*.py, `./dev e2e xen`.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import xen_dom0 as dom0
from xen_rig import Domain, XenHost, guest_config, xen_host

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
SECRET, SECRET12 = "of the first guest", "of the second"
DIGEST, DIGEST12 = b"\x5a" * 32, b"\xa5" * 20
EXTENDED, EXTENDED12 = hashlib.sha256(bytes(32) + DIGEST).hexdigest(), hashlib.sha1(bytes(20) + DIGEST12).hexdigest()
ZEROES, ZEROES12 = "0" * 64, "0" * 40
MEMORY = 128


@dataclass
class Scene:
    """What happened, by name."""

    host: XenHost
    uuids: dict[str, str]
    said: dict[str, str] = field(default_factory=dict)


def guest(scene: Scene, name: str, vtpm: str) -> Domain:
    config = guest_config(name, vtpm=[f"backend=0,uuid={scene.uuids[vtpm]}"], memory=MEMORY)
    return scene.host.create(name, config)


def two_guests(scene: Scene) -> tuple[Domain, Domain]:
    one, two = guest(scene, "one", "web"), guest(scene, "two", "old")
    for made in (one, two):
        made.ready()
        scene.said[f"device of {made.name}"] = dom0.device(made)
    scene.said["list"] = scene.host.good("xl vtpm-list one two")
    return one, two


def two_kinds_of_tpm(scene: Scene, one: Domain, two: Domain) -> None:
    scene.said["random"] = one.good("tpm2 getrandom --hex 16")
    one.good(f"tpm2 pcrextend 16:sha256={DIGEST.hex()}")
    scene.said["pcr"] = dom0.pcr(one, 16)
    dom0.write_secret(one, SECRET)
    scene.said["extended"] = dom0.extend12(two, 16, DIGEST12)
    dom0.write_secret12(two, SECRET12)
    scene.said["secret of old"] = dom0.read_secret12(two, len(SECRET12))
    scene.said["pcrs of old"] = two.good("sed -n 17p /sys/class/tpm/tpm0/pcrs")
    scene.said["family of old"] = two.good("cat /sys/class/tpm/tpm0/tpm_version_major")


def a_wrong_uuid(scene: Scene, two: Domain) -> None:
    """The second guest's configuration names the first one's vTPM, while the first one has it."""
    scene.host.run(f"xl vtpm-attach two uuid={scene.uuids['web']}")
    scene.said["refusal"] = dom0.until(scene.host, f"grep 'vTPM web is for domain one' {dom0.XEN_LOG}")
    scene.said["list after the refusal"] = scene.host.good("xl vtpm-list two")
    scene.said["pcr after the refusal"] = dom0.pcr12(two, 16)


def hot_plug(scene: Scene, one: Domain) -> None:
    """Unplugged and plugged in again, under a running guest."""
    scene.host.good("xl vtpm-detach one 0")
    scene.said["unplugged"] = one.good(
        "for _ in $(seq 50); do [ -e /dev/tpm0 ] || break; sleep 0.1; done; ls /dev/tpm* ||:"
    )
    scene.host.good(f"xl vtpm-attach one uuid={scene.uuids['web']}")
    dom0.device(one)
    scene.said["secret after plugging"] = dom0.read_secret(one, len(SECRET))
    scene.said["pcr after plugging"] = dom0.pcr(one, 16)


def another_life(scene: Scene) -> None:
    """Both guests are destroyed and made again."""
    scene.host.good("xl destroy one && xl destroy two")
    scene.said["left over"] = scene.host.good("xenstore-ls /local/domain/0/backend/vtpm 2>/dev/null ||:")
    one, two = two_guests(scene)
    scene.said["secret"], scene.said["pcr of a new life"] = dom0.read_secret(one, len(SECRET)), dom0.pcr(one, 16)
    scene.said["secret of old"] = dom0.read_secret12(two, len(SECRET12))
    scene.said["pcr of old's new life"] = dom0.pcr12(two, 16)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    prepared = dom0.Prepared({"web": "2.0", "old": "1.2"}, {"web": "one", "old": "two"})
    with xen_host(prepared, progress=sys.stdout) as host:
        played = Scene(host, prepared.uuids)
        dom0.start_manager(host)
        dom0.start_back_end(host)
        dom0.up(host)
        played.said["pages"] = host.good(f"grep /dev/mem /proc/{dom0.pid(host, 'manager')}/maps")
        one, two = two_guests(played)
        two_kinds_of_tpm(played, one, two)
        a_wrong_uuid(played, two)
        hot_plug(played, one)
        another_life(played)
        played.said["log"] = host.good(f"cat {dom0.XEN_LOG}")
        played.said["log of the manager"] = host.good(f"cat {dom0.LOG}")
        yield played


def test_the_manager_has_the_page_of_locality_two_and_no_other(scene: Scene) -> None:
    assert re.fullmatch(r"\S+ rw-s fed42000 .*/dev/mem", scene.said["pages"])


def test_each_guest_gets_its_device_and_xl_lists_both(scene: Scene) -> None:
    assert "/dev/tpm0" in scene.said["device of one"]
    assert "/dev/tpm0" in scene.said["device of two"]
    rows = [line.split() for line in scene.said["list"].splitlines() if not line.startswith("Idx")]
    assert [row[:5] for row in rows] == [["0", "0", scene.uuids[name], "0", "4"] for name in ("web", "old")]
    assert all(row[-1].startswith("/local/domain/0/backend/vtpm/") for row in rows)


def test_a_tpm_2_0_and_a_tpm_1_2_work_in_unmodified_guests(scene: Scene) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", scene.said["random"])
    assert scene.said["pcr"] == EXTENDED
    assert scene.said["extended"] == EXTENDED12
    assert bytes.fromhex(scene.said["pcrs of old"].removeprefix("PCR-16:")).hex() == EXTENDED12
    assert scene.said["family of old"] == "1"


def test_a_guest_whose_configuration_names_anothers_vtpm_does_not_get_it(scene: Scene) -> None:
    assert re.search("vTPM web is for domain one, not for .?two", scene.said["refusal"])
    (row,) = [line.split() for line in scene.said["list after the refusal"].splitlines() if scene.uuids["web"] in line]
    assert row[4] != "4"  # not connected
    assert scene.said["pcr after the refusal"] == EXTENDED12


def test_hot_unplug_takes_the_device_away_and_plugging_in_gives_the_same_tpm(scene: Scene) -> None:
    assert "/dev/tpm0" not in scene.said["unplugged"].split()
    assert scene.said["secret after plugging"] == SECRET
    assert scene.said["pcr after plugging"] == EXTENDED


def test_secrets_outlive_destroy_and_create_and_pcrs_do_not(scene: Scene) -> None:
    assert scene.said["left over"] == ""
    assert scene.said["secret"] == SECRET
    assert scene.said["secret of old"] == SECRET12
    assert scene.said["pcr of a new life"] == ZEROES
    assert scene.said["pcr of old's new life"] == ZEROES12


def test_no_command_of_a_guest_failed_or_is_missing(scene: Scene) -> None:
    steps = scene.host.transcript.steps
    assert [str(step) for step in steps if step.where in {"one", "two"} and step.code != 0] == []
    asked = [(step.where, step.command.split()[0:2]) for step in steps if step.command.startswith(("tpm2", "raw"))]
    first = ["getrandom", "pcrextend", "pcrread", "nvdefine", "nvwrite", *["nvread", "pcrread"] * 2]
    assert [words[1] for where, words in asked if where == "one"] == first
    assert [words[1] for where, words in asked if where == "two"] == ["/dev/tpm0"] * 7


def test_neither_daemon_met_an_error_but_the_refusal(scene: Scene) -> None:
    assert "Traceback" not in scene.said["log"] + scene.said["log of the manager"]
    told = [line for line in scene.said["log"].splitlines() if line.startswith(("ERROR", "CRITICAL"))]
    assert [line for line in told if "vTPM web is for domain one" not in line] == []
