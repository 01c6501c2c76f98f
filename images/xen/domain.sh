#!/bin/sh
# The first process of a domain that runs this project, led over its console. xvdc, if there is one, keeps /data.
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
ln -s /proc/self/fd /dev/fd
for place in run tmp var root; do mount -t tmpfs tmpfs /$place; done
export PATH=/opt/vtpm-manager/bin:/usr/bin:/usr/sbin HOME=/root LANG=C.UTF-8 TSS2_LOG=all+NONE
export VTPM_MANAGER_SOCKET=/run/vtpm-manager/admin.sock
ip link set lo up
[ ! -b /dev/xvdc ] || mount -t ext4 /dev/xvdc /data
. /usr/sbin/agent.sh
