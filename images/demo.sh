#!/usr/bin/env bash
# The whole chain, with real parts: tpm2-tools -> instance (libtpms) -> ring -> manager -> store -> hardware TPM at
# locality 2 (swtpm stands in). Run by ./dev demo. Leaves nothing behind; --keep keeps the directory and says where.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
PATH="$PWD/.venv/bin:$PATH"
KEEP=no; [ "${1:-}" = --keep ] && KEEP=yes

DIR=$(mktemp -d /tmp/vtpm-demo.XXXXXX)
STATE=$DIR/state RUN=$DIR/run LOG=$DIR/manager.log
export VTPM_MANAGER_SOCKET=$RUN/admin.sock TPM2TOOLS_TCTI=''
SECRET="the guest's disk key: $(head -c 9 /dev/urandom | base64)"
MANAGER=

if [ -t 1 ]; then B=$'\e[1m' D=$'\e[2m' N=$'\e[0m'; else B='' D='' N=''; fi
step() { printf '\n%s%s%s\n' "$B" "$*" "$N"; }
note() { printf '    %s\n' "$*"; }
fail() { printf 'demo: FAILED: %s\n' "$*"; printf '%s\n' "--- manager's log"; tail -n 20 "$LOG" 2>/dev/null || true; exit 1; }
run() { # run a command, show it and the first SHOW lines (default 6) of what it printed
    printf '%s  $ %s%s\n' "$D" "$*" "$N"
    "$@" >"$DIR/out" 2>&1 || { cat "$DIR/out"; fail "$1"; }
    [ "${SHOW:-6}" = 0 ] || sed -n "1,${SHOW:-6}{/./s/^/    /p}" "$DIR/out"
    [ -z "$(tail -c 1 "$DIR/out")" ] || [ "${SHOW:-6}" = 0 ] || echo
}

start_manager() {
    vtpm-manager run --state-dir "$STATE" --runtime-dir "$RUN" 2>>"$LOG" &
    MANAGER=$!
    for _ in $(seq 400); do
        [ -S "$RUN/admin.sock" ] && return 0
        kill -0 "$MANAGER" 2>/dev/null || fail "the manager did not start"
        sleep 0.05
    done
    fail "the manager was not ready in 20 s"
}
stop_manager() { kill -TERM "$MANAGER"; wait "$MANAGER" || fail "the manager did not stop cleanly"; MANAGER=; }
clean_up() {
    [ -z "$MANAGER" ] || { kill -TERM "$MANAGER" 2>/dev/null && wait "$MANAGER" || true; }
    if [ $KEEP = yes ]; then echo "kept: $DIR"; else rm -rf "$DIR"; fi
}
trap clean_up EXIT

echo "${B}vTPM manager: a guest's TPM whose secrets are sealed to the hardware TPM${N}"
note "everything happens in $DIR; swtpm stands in for the hardware TPM"

step "1. Provision: a recovery key (kept off-line in real life), then the installation itself"
run vtpm-recovery-key new "$DIR/recovery.pem"
run vtpm-manager init --state-dir "$STATE" --tcti embedded --recovery "$DIR/recovery.pem.pub"
note "the store key and the group's master key now exist only sealed: PCRs sha256:0,2,7 and locality 2"

step "2. Start the manager, add a vTPM, attach it to a guest"
start_manager
VTPM=$(vtpm-add --name web1)
note "\$ vtpm-add --name web1 -> $VTPM"
run vtpm-attach web1 guest-1
TPM2TOOLS_TCTI=$(vtpm-show web1 --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["tcti"])')
export TPM2TOOLS_TCTI
note "the guest's side: TPM2TOOLS_TCTI=$TPM2TOOLS_TCTI"

step "3. Be the guest: random numbers, a PCR, a persistent key, a secret in NV, a quote (plain tpm2-tools)"
cd "$DIR"
run tpm2_getrandom --hex 16
run tpm2_pcrextend "16:sha256=$(printf 'measured' | sha256sum | cut -d' ' -f1)"
run tpm2_createprimary -Q -C o -c primary.ctx
run tpm2_evictcontrol -C o -c primary.ctx 0x81010001
run tpm2_flushcontext -t
run tpm2_create -Q -C 0x81010001 -G ecc:ecdsa-sha256:null -u ak.pub -r ak.priv -a 'fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign'
run tpm2_load -Q -C 0x81010001 -u ak.pub -r ak.priv -c ak.ctx
run tpm2_readpublic -Q -c ak.ctx -f pem -o ak.pem
run tpm2_quote -Q -c ak.ctx -l sha256:16 -q 0badc0de -m quote.msg -s quote.sig -o quote.pcrs
SHOW=0 run tpm2_checkquote -u ak.pem -m quote.msg -s quote.sig -f quote.pcrs -q 0badc0de
note "the quote is genuine"
printf '%s' "$SECRET" >secret
run tpm2_nvdefine -Q 0x1500016 -C o -s ${#SECRET} -a 'ownerread|ownerwrite'
run tpm2_nvwrite -Q 0x1500016 -C o -i secret
note "each of these was encrypted, durable and covered by the store before tpm2-tools had its answer"
cd - >/dev/null

step "4. Stop everything: guest's TPM, manager, hardware TPM. Then look at what lies on the disk"
stop_manager
for process in /proc/[0-9]*/cmdline; do
    if tr '\0' ' ' <"$process" 2>/dev/null | grep -q -e "$RUN"; then fail "something still runs: $process"; fi
done
note "no process of it is left"
python3 - "$SECRET" "$STATE" <<'PY'
import pathlib, sys
secret, state = sys.argv[1].encode(), pathlib.Path(sys.argv[2])
assert secret in b"control: " + secret
for path in sorted(state.rglob("*.img")):
    data = path.read_bytes()
    assert secret not in data and secret[:16] not in data, f"{path} holds the secret in clear"
    print(f"    {path.relative_to(state)}: {len(data)} bytes, the secret is not in them")
PY

step "5. Start again: the same endpoint answers without a new attach, and the secret is there"
start_manager
SHOW=0 run tpm2_nvread -C o 0x1500016 -o "$DIR/again"
[ "$(cat "$DIR/again")" = "$SECRET" ] || fail "the secret is not what was written"
note "read back: $(cat "$DIR/again")"

step "6. Damage one byte of the live state: it is refused, kept, and never replaced by a fresh TPM"
run vtpm-detach web1
IMAGE=$STATE/state/$VTPM.img
cp "$IMAGE" "$DIR/good.img"
python3 - "$IMAGE" <<'PY'
import sys
with open(sys.argv[1], "r+b") as image:
    for chunk in (4096, 4096 + 16384):  # a byte inside each of the two slots
        image.seek(chunk + 600)
        byte = image.read(1)
        image.seek(chunk + 600)
        image.write(bytes([byte[0] ^ 1]))
PY
set +e
vtpm-attach web1 guest-1 >"$DIR/out" 2>&1; CODE=$?
set -e
sed 's/^/    /' "$DIR/out"
[ $CODE = 6 ] || fail "a damaged state was not refused with exit code 6 (but $CODE)"
note "exit code $CODE: integrity. Put the good image back and it works again:"
cp "$DIR/good.img" "$IMAGE"
run vtpm-attach web1 guest-1
SHOW=0 run tpm2_nvread -C o 0x1500016 -o "$DIR/again"
[ "$(cat "$DIR/again")" = "$SECRET" ] || fail "the secret did not come back"
stop_manager

step "What next"
note "README.md: the same with your own hardware TPM; docs/threat-model.md: what is protected from whom;"
note "images/systemd/: units that start it at boot; 'vtpm --help': every verb"
echo
echo "demo: the secret survived a restart of everything, and only the right state was accepted"
