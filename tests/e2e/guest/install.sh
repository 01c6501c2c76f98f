# First boot: Linux's driver has the TPM. It is taken away, then everything happens at locality 2.
run readlink /sys/class/tpm/tpm0/device/driver
run cat /sys/class/tpm/tpm0/pcr-sha256/1
run python /data/localities.py --unbind
run vtpm-recovery-key new /data/recovery.pem
run vtpm-approve new-key /data/saa.pem
run vtpm-manager init --state-dir $state --tcti tis:base=0xfed40000,locality=2,path=/dev/mem --pcrs sha256:0,1,7 --recovery /data/recovery.pem.pub --saa /data/saa.pem.pub
for object in platform default; do
    target=$state/approvals/$object.json
    sign="vtpm-approve sign --key /data/saa.pem --group $target --pcrs-from $target"
    run $sign --sequence 1 --comment present -o /data/$object.1
    run $sign --sequence 2 --comment upgrade --pcr "1=$(cat /data/predicted)" -o /data/$object.2
done
run vtpm-manager approve --state-dir $state /data/platform.1 /data/default.1 /data/platform.2 /data/default.2
run start_manager
run grep /dev/mem /proc/$manager/maps
run vtpm-add --name web1
run vtpm-attach web1 guest-1 --json
TPM2TOOLS_TCTI=swtpm:path=$(echo $runtime/vtpm/*/swtpm.sock)
export TPM2TOOLS_TCTI
run tpm2 nvdefine 0x1500016 -C o -s 16 -a 'ownerread|ownerwrite'
cp /data/secret /tmp/secret
run tpm2 nvwrite 0x1500016 -C o -i /tmp/secret
run stop_manager
