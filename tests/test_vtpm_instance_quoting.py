"""Deep quotes from the guest's side and by the manager's order: real instances, real libtpms, real rings."""

from collections.abc import Callable, Iterator

import pytest
from vtpm_instance_commands import (
    SHUTDOWN_STATE,
    STARTUP_CLEAR,
    extended,
    get_random,
    pcr_extend,
    pcr_read,
    rc,
)
from vtpm_instance_rig import Bench, KeeperProcess, running_keeper, transact, until

from frontend_backend.deep_quote import DeepQuoteCommand, Evidence
from frontend_backend.messages_instance import (
    InstanceState,
    QuoteReply,
    QuoteTaskReply,
    Refusal,
    RefusalCode,
    Reply,
    ReportReply,
)
from frontend_backend.orders import Orders
from frontend_backend.tpmhdr import TpmFamily
from manager.attest_wire import KeyPublic, QuoteAttest, verify

MakeBench = Callable[..., Bench]
WISH = DeepQuoteCommand(b"the guest's nonce", 0x400)


@pytest.fixture(scope="module")
def keeper() -> Iterator[KeeperProcess]:
    with running_keeper() as process:
        yield process


@pytest.fixture
def make_bench(keeper: KeeperProcess) -> Iterator[MakeBench]:
    made: list[Bench] = []

    def make(**options: str) -> Bench:
        made.append(Bench(keeper, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def order(bench: Bench, task: QuoteTaskReply) -> None:
    assert bench.manager is not None
    bench.manager.task = task
    bench.manager.orders = Orders.QUOTE
    bench.manager.ring.ring()  # "ask me"


def test_an_instance_says_that_it_knows_the_order(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    assert [report.quotes for report in bench.record.reports] == [True]


@pytest.mark.parametrize("family", list(TpmFamily))
def test_a_guest_gets_the_bundle_and_the_manager_its_evidence(make_bench: MakeBench, family: TpmFamily) -> None:
    bench = make_bench(family=family.value)
    manager = bench.spawn()
    manager.quote_answer = QuoteReply(b"the bundle")
    if family is TpmFamily.TPM_2_0:
        assert rc(bench.run(pcr_extend(10, b"\x33" * 32))) == 0
    answer = bench.run(WISH.pack(family))
    assert rc(answer) == 0
    assert answer[10:] == b"\0\x0athe bundle"
    (quote,) = bench.record.quotes
    assert quote.nonce == WISH.nonce
    evidence = Evidence.unpack(quote.evidence)
    assert (evidence.family, evidence.selection) == (family, WISH.selection)
    assert evidence.emulator.startswith("libtpms ")
    if family is TpmFamily.TPM_2_0:
        assert evidence.values == (extended(b"\x33" * 32),)
        verify(evidence.signature, evidence.attest, KeyPublic.unpack(evidence.public).point)
        assert QuoteAttest.unpack(evidence.attest).extra == WISH.nonce


@pytest.mark.parametrize(
    ("answer", "code_20", "code_12"),
    [
        (Refusal(RefusalCode.LIMIT, "too often"), 0x922, 0x800),
        (Refusal(RefusalCode.DENIED, "no key"), 0x120, 0x008),
        (Refusal(RefusalCode.MALFORMED, "an earlier manager"), 0x120, 0x008),
        (ReportReply(), 0x120, 0x008),
    ],
)
def test_a_refusal_is_a_code_that_the_guest_understands(
    make_bench: MakeBench, answer: Reply, code_20: int, code_12: int
) -> None:
    for family, code in ((TpmFamily.TPM_2_0, code_20), (TpmFamily.TPM_1_2, code_12)):
        bench = make_bench(family=family.value)
        bench.spawn().quote_answer = answer
        with bench.data() as sock:
            assert rc(transact(sock, WISH.pack(family))) == code
            alive = get_random(4) if family is TpmFamily.TPM_2_0 else bytes.fromhex("00c10000000e0000004600000004")
            assert rc(transact(sock, alive)) == 0


def test_what_is_no_command_of_ours_is_refused_before_anybody_is_asked(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    good = WISH.pack(TpmFamily.TPM_2_0)
    for wrong in (good[:10], good[:-1], good + b"\0", b"\x80\x02" + good[2:], good[:10] + b"\0\0" + good[12:]):
        framed = wrong[:2] + len(wrong).to_bytes(4) + wrong[6:]
        assert rc(bench.run(framed)) == 0x95
    assert not bench.record.quotes
    assert rc(bench.run(good[:6] + b"\x20\0\0\x17" + good[10:])) == 0x143  # another vendor command is libtpms' affair


def test_a_tpm_that_is_not_started_up_says_so(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn(startup="none")
    assert rc(bench.run(WISH.pack(TpmFamily.TPM_2_0))) == 0x100
    assert rc(bench.run(STARTUP_CLEAR)) == 0
    bench.manager.quote_answer = QuoteReply(b"b")  # type: ignore[union-attr]
    assert rc(bench.run(WISH.pack(TpmFamily.TPM_2_0))) == 0


def test_a_tpm_that_its_guest_has_shut_down_is_left_alone(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    assert rc(bench.run(pcr_extend(10))) == 0
    assert rc(bench.run(SHUTDOWN_STATE)) == 0
    commits = bench.record.commits
    order(bench, QuoteTaskReply(5, b"n", 1))
    until(lambda: bool(bench.record.made), "the refusal")
    assert "shut it down" in bench.record.made[0].problem
    for _ in range(2):  # asking again does not help: the refusal was no command to the TPM
        assert rc(bench.run(WISH.pack(TpmFamily.TPM_2_0))) == 0x120
    assert bench.record.commits == commits
    assert bench.kill(15) == 0
    assert bench.record.resumable  # the saved state of the guest's shutdown is still there to be resumed
    bench.spawn("state")
    assert bench.run(pcr_read(10))[-32:] == extended(b"\x11" * 32)


def test_an_order_is_obeyed_between_two_commands(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    with bench.data() as sock:
        for ticket in range(1, 6):
            assert rc(transact(sock, pcr_extend(3, bytes([ticket]) * 32))) == 0
            order(bench, QuoteTaskReply(ticket, b"n" * ticket, 1 << 3))
            assert rc(transact(sock, get_random(8))) == 0
            until(lambda wanted=ticket: len(bench.record.made) == wanted, "evidence")  # type: ignore[misc]
            made = bench.record.made[-1]
            assert (made.ticket, made.problem) == (ticket, "")
            evidence = Evidence.unpack(made.evidence)
            assert evidence.values == (extended(*(bytes([n]) * 32 for n in range(1, ticket + 1))),)
            assert QuoteAttest.unpack(evidence.attest).extra == b"n" * ticket
    order(bench, QuoteTaskReply(0))  # not wanted any more
    assert rc(bench.run(get_random(8))) == 0
    assert len(bench.record.made) == 5


def test_a_save_that_fails_while_evidence_is_made_fails_the_vtpm(make_bench: MakeBench) -> None:
    """After the guest's shutdown and one of its own, ours take the shutdown back: that is stored."""
    bench = make_bench()
    manager = bench.spawn()
    assert rc(bench.run(SHUTDOWN_STATE)) == 0
    assert rc(bench.run(get_random(4))) == 0
    manager.refuse = RefusalCode.STORE_FAILED
    assert rc(bench.run(WISH.pack(TpmFamily.TPM_2_0))) != 0
    until(lambda: bench.record.states[-1] is InstanceState.NEEDS_RESET, "the report")
    assert manager.refused
    assert not bench.record.quotes
    manager.refuse = None
    assert rc(bench.run(get_random(4))) == 0x101
    manager.give(Orders.RESET)
    until(lambda: bench.record.states[-1] is InstanceState.READY, "the reset")
    assert rc(bench.run(get_random(4))) == 0


def test_only_the_guest_that_asks_waits_for_the_hardware(make_bench: MakeBench) -> None:
    slow, other = make_bench(), make_bench()
    manager = slow.spawn()
    other.spawn()
    manager.quote_answer = QuoteReply(b"late")
    manager.set_mute(mute=True)
    with slow.data() as asking, other.data() as working:
        asking.sendall(WISH.pack(TpmFamily.TPM_2_0))
        until(lambda: bool(slow.record.quotes), "the question")
        for _ in range(50):
            assert rc(transact(working, pcr_extend(1))) == 0
        assert slow.control(bytes.fromhex("00000001"), 8)  # its control channel answers meanwhile, too
        manager.set_mute(mute=False)
        head = asking.recv(4096)
    assert head[10:] == b"\0\x04late"
