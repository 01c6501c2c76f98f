#!/bin/sh
# The first process of dom0's root: Xen's daemons, then the agent that the test leads. vdc keeps /data.
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
ln -s /proc/self/fd /dev/fd
for place in run tmp var root; do mount -t tmpfs tmpfs /$place; done
mkdir -p /run/xen /run/lock /run/xenstored /var/log/xen/console /var/lib/xen
ln -s /run /var/run
mount -t xenfs xenfs /proc/xen
export PATH=/opt/vtpm-manager/bin:/usr/lib/xen-4.17/bin:/usr/bin:/usr/sbin HOME=/root LANG=C.UTF-8 TSS2_LOG=all+NONE
export VTPM_MANAGER_SOCKET=/run/vtpm-manager/admin.sock
ip link set lo up
mount -t ext4 /dev/vdc /data
xenstored --pid-file /run/xenstored/xenstored.pid
xen-init-dom0 >/run/xen-init-dom0 2>&1
xenconsoled --log=all --log-dir=/var/log/xen/console --pid-file=/run/xenconsoled.pid
python3.11 -I -S /usr/sbin/dom0_agent.py
echo "the agent ended with $?"
umount /data
sync
poweroff -f
