#!/bin/sh
# The first process of a guest. Nothing here knows of the test but the agent; the TPM is Linux's xen-tpmfront's affair.
/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
export PATH=/bin:/sbin HOME=/root LANG=C.UTF-8 TSS2_LOG=all+NONE TPM2TOOLS_TCTI=device:/dev/tpm0
case " $(cat /proc/cmdline) " in *" bare "*) ;; *) insmod /modules/xen-tpmfront.ko ;; esac
. /agent.sh
