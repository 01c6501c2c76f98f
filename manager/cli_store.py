"""`vtpm-manager restore` and `rebuild-catalogue`: what they print. What they do: restore, rebuild."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from frontend_backend.messages_admin import ExitCode
from manager.config import Config, Layout
from manager.verb_table import SCHEMA_VERSION

MakeVerb = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_verbs(verb: MakeVerb, layout: Callable[[argparse.Namespace], Layout], config: Callable[..., Config]) -> None:
    """Add both verbs to the parser that `verb` adds to; `layout` and `config` read the options of every verb."""

    def restore_verb(options: argparse.Namespace) -> int:
        return _restore(options, layout(options))

    def rebuild_verb(options: argparse.Namespace) -> int:
        return _rebuild(options, layout(options), config(options, layout(options)))

    made = verb("restore", restore_verb, "unpack a backup into a new state directory")
    made.add_argument("file", metavar="FILE", help="the backup")
    made.add_argument(
        "--catalogue",
        metavar="URL",
        help="put the catalogue into this PostgreSQL database, or into a file: 'file' (default: as the backup's "
        "configuration says)",
    )
    made.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON document")
    made = verb("rebuild-catalogue", rebuild_verb, "make the catalogue anew from the store; labels are lost")
    made.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON document")


def _restore(options: argparse.Namespace, layout: Layout) -> int:
    from manager.restore import restore  # noqa: PLC0415 - --help should not load what it does not need

    done = restore(Path(options.file), layout.state_dir, options.catalogue)
    if options.form == "json":
        print(json.dumps({"schema": SCHEMA_VERSION, "state_dir": str(layout.state_dir), **asdict(done)}, indent=2))
        return int(ExitCode.OK)
    print(
        f"restored store {done.store}, sequence {done.sequence}: {done.vtpms} vTPMs, {done.state_images} state images"
    )
    for vtpm, place in done.named.items():
        print(f"put {layout.state_dir / 'named' / vtpm}.img to {place}, where its vTPM looks for it")
    print(
        f"start it with 'vtpm-manager run --state-dir {layout.state_dir}'. If the hardware TPM knows a newer store, it "
        f"exits with 6; on another TPM, or to go back on purpose, see 'vtpm-manager recover'",
        file=sys.stderr,
    )
    return int(ExitCode.OK)


def _rebuild(options: argparse.Namespace, layout: Layout, config: Config) -> int:
    from manager.rebuild import rebuild_catalogue  # noqa: PLC0415 - as above

    done = rebuild_catalogue(layout, config)
    if options.form == "json":
        print(json.dumps({"schema": SCHEMA_VERSION, **asdict(done)}, indent=2))
        return int(ExitCode.OK)
    print(f"{done.groups} groups, {done.names_kept} names kept, {done.names_made} made from UUIDs")
    if done.attachments_lost is None:
        print("the attachments there were are lost: attach the vTPMs again")
    else:
        print(f"{done.attachments_kept} attachments kept")
    if done.attachments_lost:
        print(f"{done.attachments_lost} attachments are lost: attach the vTPMs again")
    print("labels are lost: put them on again with 'vtpm-label'")
    if done.old is not None:
        print(f"the catalogue that was there is kept as {done.old}")
    for what in done.unclear:
        print(what, file=sys.stderr)
    return int(ExitCode.OK)
