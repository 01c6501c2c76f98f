"""Xen, all in dom0: what ends while guests run. Back end and manager killed, guests saved, crashed, destroyed half-way.

One host, one guest; each test leaves the guest as the next one expects it. `./dev e2e xen` runs them.
"""

import os
import re
import sys
from collections.abc import Iterator

import pytest
import xen_dom0 as dom0
from xen_rig import Domain, XenHost, guest_config, xen_host

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("VTPM_XEN_DOMAINS") != "yes", reason="two minutes: ./dev e2e xen runs it"),
]
WEB = "aaaaaaaa-2222-3333-4444-555555555555"
UNKNOWN = "99999999-2222-3333-4444-555555555555"
DIGEST = "11" * 32
ZEROES = "0" * 64
BACKS = "/local/domain/0/backend/vtpm"
# commands one after the other; says how many failed
LOOP = (
    "i=0; f=0; while [ $i -lt {count} ]; do tpm2 getrandom 4 --hex >/dev/null 2>>/tmp/errors || f=$((f+1)); "
    "i=$((i+1)); done; echo failed $f"
)


@pytest.fixture(scope="module")
def prepared() -> dom0.Prepared:
    return dom0.Prepared({"web": "2.0"}, {"web": "web"})


@pytest.fixture(scope="module")
def host(prepared: dom0.Prepared) -> Iterator[XenHost]:
    with xen_host(prepared, progress=sys.stdout) as host:
        dom0.start_manager(host)
        dom0.start_back_end(host)
        dom0.up(host)
        yield host
        host.run(f"cat {dom0.XEN_LOG}; tail -n 20 {dom0.LOG}; ls -la {dom0.RUNTIME}/xen; xenstore-ls -f {BACKS}")


@pytest.fixture(scope="module")
def config(host: XenHost, prepared: dom0.Prepared) -> str:
    vtpm = [f"backend=0,uuid={prepared.uuids['web']}"]
    return guest_config("web", vtpm=vtpm, memory=128, lines=[f'uuid="{WEB}"'])


@pytest.fixture(scope="module")
def web(host: XenHost, config: str) -> Domain:
    made = host.create("web", config)
    made.ready()
    dom0.device(made)
    made.good(f"tpm2 pcrextend 16:sha256={DIGEST}")
    return made


def failed(said: tuple[int, str]) -> int:
    (count,) = re.findall(r"failed (\d+)", said[1])
    return int(count)


def descriptors(host: XenHost) -> int:
    return int(host.good(f"ls /proc/{dom0.pid(host, 'vtpm-xen')}/fd | wc -l"))


def test_a_killed_back_end_costs_at_most_the_command_in_hand(host: XenHost, web: Domain) -> None:
    before = dom0.pcr(web, 16)
    loop = web.start(LOOP.format(count=20))
    host.good(f"kill -9 {dom0.pid(host, 'vtpm-xen')}; sleep 1")
    dom0.start_back_end(host)
    assert failed(loop.wait()) <= 1
    assert dom0.pcr(web, 16) == before != ZEROES, "no power cycle"
    assert host.good(f"xenstore-read {BACKS}/{web.number}/0/state").strip() == "4"


def test_a_back_end_that_is_told_to_end_costs_nothing(host: XenHost, web: Domain) -> None:
    loop = web.start(LOOP.format(count=20))
    host.good(f"kill {dom0.pid(host, 'vtpm-xen')}; sleep 2")
    dom0.start_back_end(host)
    assert failed(loop.wait()) == 0


def test_an_unplug_during_a_command_leaves_a_whole_tpm(host: XenHost, web: Domain, prepared: dom0.Prepared) -> None:
    before = dom0.pcr(web, 16)
    making = web.start("tpm2 createprimary -G rsa3072 -c /tmp/key.ctx >/dev/null 2>&1; echo ended $?")
    host.good("sleep 0.3; xl vtpm-detach web 0")
    assert "ended" in making.wait()[1]
    host.good(f"xl vtpm-attach web uuid={prepared.uuids['web']}")
    dom0.device(web)
    assert dom0.pcr(web, 16) == before


def test_a_saved_guest_finds_its_vtpm_as_it_left_it(host: XenHost, web: Domain) -> None:
    before = dom0.pcr(web, 16)
    host.good("xl save web /tmp/web.save && xl restore /tmp/web.save && rm /tmp/web.save")
    restored = host.opened("web")
    # Linux's driver makes a new chip before it lets the old one go: after a resume it is /dev/tpm1
    newest = "device:$(ls /dev/tpm[0-9] | tail -n 1)"
    restored.good("for _ in $(seq 150); do ls /dev/tpm[0-9] 2>/dev/null && break; sleep 0.2; done; ls -l /dev/tpm*")
    restored.good(f"TPM2TOOLS_TCTI={newest}; for _ in $(seq 50); do tpm2 getrandom 4 --hex && break; sleep 0.2; done")
    assert dom0.pcr(restored, 16) == before != ZEROES
    assert "resumed" in host.good(f"cat {dom0.XEN_LOG}")


def test_a_domain_that_is_made_anew_is_a_power_cycle(host: XenHost, config: str) -> None:
    host.good("xl destroy web ||:")
    made = host.create("web", config)
    made.ready()
    dom0.device(made)
    assert dom0.pcr(made, 16) == ZEROES


def test_a_crashed_guest_leaves_nothing_behind(host: XenHost) -> None:
    before = descriptors(host)
    guest = host.opened("web")
    guest.start("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger")
    dom0.until(host, "! xl domid web")
    dom0.until(host, f"! xenstore-exists {BACKS}")
    dom0.until(host, f"[ $(ls /proc/{dom0.pid(host, 'vtpm-xen')}/fd | wc -l) -lt {before} ]")
    dom0.until(host, f'[ "$(ls {dom0.RUNTIME}/xen)" = lock ]')


@pytest.mark.parametrize("state", ["Initialising", "Initialised", "paused"])
def test_a_guest_is_destroyed_half_way_through_the_handshake(host: XenHost, config: str, state: str) -> None:
    before = descriptors(host)
    match state:
        case "Initialising":  # no driver: the front end never leaves state 1
            half = config.replace('extra="', 'extra="bare ')
        case "Initialised":  # nobody has this vTPM: the back end stays in state 2
            half = re.sub(r"uuid=[0-9a-f-]+\"\]", f'uuid={UNKNOWN}"]', config)
        case _:
            half = config
    host.write("/tmp/half.cfg", half)
    host.good("xl create -q " + ("-p " if state == "paused" else "") + "/tmp/half.cfg")
    if state == "Initialised":
        path = "/local/domain/$(xl domid web)/device/vtpm/0/state"
        dom0.until(host, f"[ $(xenstore-read {path}) = 3 ]", 60)
    assert host.good(f"xenstore-read {BACKS}/$(xl domid web)/0/state").strip() == "2"
    host.good("xl destroy web")
    dom0.until(host, f"! xenstore-exists {BACKS}")
    dom0.until(host, f"[ $(ls /proc/{dom0.pid(host, 'vtpm-xen')}/fd | wc -l) -le {before} ]")


def test_a_killed_manager_is_not_noticed(host: XenHost, config: str) -> None:
    made = host.create("web", config)
    made.ready()
    dom0.device(made)
    made.good(f"tpm2 pcrextend 16:sha256={DIGEST}")
    before = dom0.pcr(made, 16)
    loop = made.start(LOOP.format(count=20))
    host.good(f"kill -9 {dom0.pid(host, 'manager')}")
    dom0.start_manager(host)
    assert failed(loop.wait()) == 0
    dom0.until(host, "vtpm-show web --json | grep -q '\"bound_domain\": [0-9]'", 150)
    assert dom0.pcr(made, 16) == before
