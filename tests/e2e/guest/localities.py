"""In the guest: which localities the machine grants, a JSON document a line; --unbind takes Linux's driver away."""

import dataclasses
import json
import sys
from pathlib import Path

from manager.hwtpm_localities import survey
from manager.hwtpm_setting import TctiSetting

UNBIND = Path("/sys/bus/platform/drivers/tpm_tis/unbind")


def show(when: str) -> None:
    for tried in survey(TctiSetting.parse("tis")):
        print(json.dumps(dataclasses.asdict(tried) | {"when": when}))


if "--unbind" in sys.argv:
    show("bound")
    UNBIND.write_text("MSFT0101:00")
show("unbound")
