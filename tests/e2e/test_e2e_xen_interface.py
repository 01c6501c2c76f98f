"""Xen's interfaces as this project uses them, under a real Xen: in dom0, in a domain of ours, and across both.

`./dev e2e xen` runs it. The image's Python runs `frontend_backend.xen_selfcheck`, which sees grants, event channels and
xenstore from both ends; what follows needs a second domain or a process that is killed.
"""

import os
import sys

import pytest
import xen_dom0 as dom0
from xen_rig import Domain, XenHost, domain_config, guest_config, xen_host

PYTHON = "/opt/vtpm-manager/bin/python"
SELF_CHECK = f"{PYTHON} -m frontend_backend.xen_selfcheck"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("VTPM_XEN_DOMAINS") != "yes", reason="a minute: ./dev e2e xen runs it"),
]

# 768 of the 1,024 pages gntalloc gives all processes together: a second one gets none where the first one's stay.
KILLED = """
import os, signal
from frontend_backend.xen_devices import DeviceGrantOffers, DeviceGrants, DeviceEventChannels
offers, grants, channels = DeviceGrantOffers.open(), DeviceGrants.open(), DeviceEventChannels.open()
kept = [offers.offer(0, 256) for _ in range(3)]
kept += [grants.map(0, pages.references) for pages in kept]
kept += [channels.bind_interdomain(0, channels.bind_unbound(0)) for _ in range(50)]
kept[3].page[:4] = b"seen"
print(bytes(kept[0].page[:4]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

# In a domain: offers two pages to dom0, and says when dom0 has written into them.
OFFERED = (
    "import time; from frontend_backend.xen_devices import DeviceGrantOffers; offers = DeviceGrantOffers.open(); "
    "pages = offers.offer(0, 2); pages.page[:4] = b'ours'; print(*pages.references, flush=True); "
    "[time.sleep(0.1) for _ in iter(lambda: bytes(pages.page[4:8]), b'dom0')]; print('seen', flush=True); "
    "time.sleep(600)"
)
# In dom0: maps them until /tmp/let-go is there.
MAPPED = """
import os, sys, time
from frontend_backend.xen_devices import DeviceGrants
grants = DeviceGrants.open()
pages = grants.map(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
pages.page[4:8] = b"dom0"
while not os.path.exists("/tmp/let-go"):
    time.sleep(0.1)
print(bytes(pages.page[:8]), flush=True)
pages.unmap()
"""

WHO = (
    "import trio; from frontend_backend.xs_trio import open_xenstore; "
    "from manager.xen_backend_identity import identify; "
    "exec('async def main():\\n async with open_xenstore() as xs:\\n  print(await identify(xs, {}))'); trio.run(main)"
)

INFO = f"""{PYTHON} -c '
import sys
from frontend_backend.xen_hypercalls import Hypervisor
info = Hypervisor.open().info(int(sys.argv[1]))
print(info and (info.has_run, info.paused, info.shutdown_code, info.uuid))' """


def checked(said: str) -> list[str]:
    lines = said.splitlines()
    assert [line[:5] for line in lines] == ["ok   "] * 5, said
    return lines


def test_grants_channels_xenstore_and_what_xen_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled(), xen_host(progress=sys.stdout) as host:
        lines = checked(host.good(SELF_CHECK))
        assert "/run/xenstored/socket: domain 0" in lines[0]
        assert "has_run" not in lines[4]
        assert "domain=0" in lines[4]
        assert "Xen runs without XSM" in lines[4]
        a_killed_process_leaves_nothing(host)
        xen_knows_whether_a_domain_has_run(host)
        domain = host.create("ours", domain_config("ours"))
        domain.ready()
        lines = checked(domain.good(SELF_CHECK))
        assert "/dev/xen/xenbus: domain" in lines[0]
        assert "not available in this domain" in lines[4]
        a_name_is_read_where_dom0_lets_it_be_read(host, domain)
        a_domain_that_is_destroyed_stays_until_its_pages_are_let_go(host, domain)


def a_killed_process_leaves_nothing(host: XenHost) -> None:
    host.write("/tmp/killed.py", KILLED)
    for _ in range(2):
        code, said = host.run(f"{PYTHON} /tmp/killed.py")
        assert (code, said.splitlines()[0]) == (-9, "b'seen'"), said


def xen_knows_whether_a_domain_has_run(host: XenHost) -> None:
    host.write("/tmp/guest.cfg", guest_config("knows"))
    host.good("xl create -p -q /tmp/guest.cfg")
    number = host.good("xl domid knows").strip()
    uuid = host.good(f"xenstore-read /local/domain/{number}/vm").strip().removeprefix("/vm/")
    assert host.good(INFO + number).strip() == f"(False, True, None, '{uuid}')"
    host.good("xl unpause knows")
    host.good("sleep 1; xl pause knows")
    assert host.good(INFO + number).strip() == f"(True, True, None, '{uuid}')"
    host.good("xl destroy knows")
    assert host.good(INFO + number).strip() == "None"


def a_name_is_read_where_dom0_lets_it_be_read(host: XenHost, domain: Domain) -> None:
    """What docs/xen.md, (b), step 4 has the toolstack do for a driver domain."""
    host.write("/tmp/guest.cfg", guest_config("web1", memory=128))
    host.good("xl create -p -q /tmp/guest.cfg")
    number = host.good("xl domid web1").strip()
    uuid = host.good(f"xenstore-read /local/domain/{number}/vm").strip().removeprefix("/vm/")
    who = f'{PYTHON} -c "{WHO.format(number)}"'
    assert "name='', uuid=''" in domain.good(who)
    host.good("G=$(xl domid web1) B=$(xl domid ours); xenstore-chmod /local/domain/$G/name n0 r$G r$B && "
              "xenstore-chmod /local/domain/$G/vm n0 r$G r$B")  # fmt: skip
    assert f"name='web1', uuid='{uuid}'" in domain.good(who)
    host.good("xl destroy web1")


def a_domain_that_is_destroyed_stays_until_its_pages_are_let_go(host: XenHost, domain: Domain) -> None:
    """Dom0 has pages of the domain mapped: Xen keeps them, and what is left of the domain, until dom0 unmaps them."""
    host.write("/tmp/mapped.py", MAPPED)
    domain.good(f'{PYTHON} -c "{OFFERED}" >/run/offered 2>&1 </dev/null &')
    references = domain.good(appears_in_offered("[0-9]"))
    mapping = host.start(f"{PYTHON} /tmp/mapped.py {domain.number} {references}")
    assert domain.good(appears_in_offered("seen")).endswith("seen")
    host.good("xl destroy ours")
    rows = [line.split() for line in host.good("xl list").splitlines()]
    (state,) = [row[-2] for row in rows if row[-5] == str(domain.number)]
    assert "d" in state, "no dying domain"
    host.good("touch /tmp/let-go")
    assert mapping.wait() == (0, "b'oursdom0'\n")
    dom0.until(host, f"! xl list | grep -E ' {domain.number} .*d '")


def appears_in_offered(pattern: str) -> str:
    return f"(for _ in $(seq 300); do grep -q '{pattern}' /run/offered && break; sleep 0.2; done; cat /run/offered)"
