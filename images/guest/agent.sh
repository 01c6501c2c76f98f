#!/bin/sh
# The first process of a guest that is led from outside: a line on the second serial port is a command of the shell, with
# a number before it; the answer is a line `NUMBER CODE BYTES` and then that many bytes of output, both streams together.
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t securityfs securityfs /sys/kernel/security
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
export PATH=/bin:/sbin HOME=/root LANG=C.UTF-8 TSS2_LOG=all+NONE TPM2TOOLS_TCTI=device:/dev/tpmrm0
cd /tmp || exit 1
exec 3<>/dev/ttyS1
stty raw -echo <&3
read -r up rest </proc/uptime
echo "ready 0 ${#up}" >&3
printf %s "$up" >&3
while read -r number line <&3; do
    eval "$line" >/run/said 2>&1 </dev/null
    code=$?
    echo "$number $code $(stat -c %s /run/said)" >&3
    cat /run/said >&3
done
poweroff -f
