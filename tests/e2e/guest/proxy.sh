# A host whose kernel has the vTPM proxy: a device for programs and containers, whatever happens to those that serve it.
# The machine's own TPM is the manager's, by its registers; Linux's driver for it was never loaded.
# With "more" on the kernel's command line: a TPM 1.2, whose device a sleeper has while the manager is killed, and vsock.
case " $(cat /proc/cmdline) " in *" more "*) more=yes ;; *) more= ;; esac
run vtpm-manager init --state-dir $state --tcti tis:locality=2 --pcrs none --no-recovery
run start_manager
run vtpm-add --name web
run vtpm-attach web host --frontend proxy
run insmod /modules/tpm_vtpm_proxy.ko
run vtpm-attach web host --frontend proxy --owner nobody --mode 0640 --json
run stat -c '%U %a' /dev/tpm0 /dev/tpmrm0
numbers() { sed -n 's/.*"resource_manager_numbers": "\([0-9]*\):\([0-9]*\)".*/\1 \2/p'; }
# as a container gets it: a node of its own with these numbers, under another name
set -- $(vtpm-show web --json | numbers)
mkdir /box
run mknod /box/tpmrm c "$1" "$2"
export TPM2TOOLS_TCTI=device:/box/tpmrm
run tpm2 nvdefine 0x1500016 -C o -s 16 -a 'ownerread|ownerwrite'
cp /data/secret /tmp/secret
run tpm2 nvwrite 0x1500016 -C o -i /tmp/secret
run tpm2 pcrextend 16:sha256=5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a
secret() { tpm2 nvread 0x1500016 -C o -s 16 && tpm2 pcrread sha256:16; }
ends() { for _ in $(seq 100); do kill -0 "$1" 2>/dev/null || return 0; sleep 0.1; done; return 1; }
state_is() {
    for _ in $(seq 100); do
        vtpm-show "$1" --json | grep -q "\"state\": \"$2\"" && return 0
        sleep 0.1
    done
    vtpm-show "$1" --json
    return 1
}
if [ $more ]; then
    run vtpm-add --name old --tpm 1.2
    run vtpm-attach old host --frontend proxy --json
    run cat /sys/class/tpm/tpm1/tpm_version_major /sys/class/tpm/tpm1/pcrs
    run ls /dev/tpm1 /dev/tpmrm1
    run vtpm-hibernate old --quiet
fi

# the service of a guest of Xen makes a whole device of a raw one: here of this one, in place of xen-tpmfront's
vtpm-guest-device --device /dev/tpm0 --link /tmp/vtpmrm 2>/tmp/service &
service=$!
for _ in $(seq 100); do [ -L /tmp/vtpmrm ] && break; sleep 0.1; done
TPM2TOOLS_TCTI=device:/tmp/vtpmrm run secret through-the-service
kill $service
wait $service
echo "ended $?" >>/tmp/service
run cat /tmp/service

# asleep: no process; the next command wakes it
run vtpm-hibernate web --quiet
run state_is web hibernated
run secret after-hibernation

# the manager is killed; the device's vTPM goes on without it, and with the next one
kill -9 $manager
ends $manager
run secret without-a-manager
rm -f $runtime/admin.sock
run start_manager
[ $more ] && run cat /sys/class/tpm/tpm1/pcrs

# the instance is killed with a command under way, which is answered with failure; then until the platform is reset.
# That the device stays without an instance also says that the new manager has it.
(
    # a key may be found at once: one after the other, until it is killed under one of them
    for _ in $(seq 50); do
        timeout 100 tpm2 createprimary -C o -G rsa3072 -c /tmp/primary >/dev/null
        code=$?
        [ $code = 0 ] || break
    done
    echo "ended $code" >/tmp/in-flight
) 2>/tmp/in-flight.log &
vtpm-show web --json >/tmp/shown
run cat /tmp/shown
instance=$(sed -n 's/.*"pid": \([0-9]*\),.*/\1/p' /tmp/shown)
run kill -9 "$instance"
run ends "$instance"
wait $!
run cat /tmp/in-flight /tmp/in-flight.log
run state_is web needs-reset
run secret of-a-crashed-one
run vtpm-reset-platform web --quiet
run tpm2 nvread 0x1500016 -C o -s 16

# a program that goes on using the device does not keep it
tpm2 createprimary -C o -G rsa3072 -c /tmp/primary >/tmp/last 2>&1 &
run vtpm-detach web --quiet
wait $!
run ls /dev/tpm0
run ls /dev/tpmrm0

if [ $more ]; then
    run vtpm-detach old --quiet
    run ls /dev/tpm1
    # a relay over vsock, within this machine
    for module in vsock vmw_vsock_virtio_transport_common vsock_loopback; do insmod /modules/$module.ko; done
    run vtpm-attach web guest --frontend socket --quiet
    mkdir /tmp/id /tmp/near
    run vtpm-relay key /tmp/id --name both
    printf '[[client]]\nname = "here"\ncertificate = "/tmp/id/relay.crt"\nvtpms = ["web"]\n' >/tmp/clients.toml
    vtpm-relay serve --listen vsock:any:9443 --clients /tmp/clients.toml --identity /tmp/id 2>/tmp/serve.log &
    serve=$!
    vtpm-relay connect --to vsock:1:9443 --identity /tmp/id --far-certificate /tmp/id/relay.crt --directory /tmp/near 2>/tmp/connect.log &
    connect=$!
    for _ in $(seq 200); do [ -S /tmp/near/web/swtpm.sock ] && break; sleep 0.1; done
    TPM2TOOLS_TCTI=swtpm:path=/tmp/near/web/swtpm.sock run tpm2 nvread 0x1500016 -C o -s 16
    run cat /tmp/serve.log
    kill $serve $connect
    wait $serve $connect
fi
run stop_manager
run grep -i -E 'bug|traceback|exception' /data/manager.log
