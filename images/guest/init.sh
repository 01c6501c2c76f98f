#!/bin/sh
# The first process of a test guest: mounts what there is, loads /modules, mounts the disk at /data and runs /data/guest.sh.
# What it prints between @@USERSPACE and @@DONE is the transcript. The machine is switched off at the end, whatever happened.
if [ $$ = 1 ] && [ ! -e /new ]; then
    # pivot_root, with which instances are shut in, works in a mounted root only: mount the initramfs over itself
    /bin/busybox mkdir /new
    /bin/busybox mount --bind / /new
    cd /new || exit 1
    /bin/busybox mount --move . /
    exec /bin/busybox chroot . /init
fi
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
ln -s /proc/self/fd /dev/fd
ip link set lo up
read -r up rest </proc/uptime
echo "@@USERSPACE $up"
while read -r module; do insmod "/modules/$module"; done </modules/order
export PATH=/opt/vtpm-manager/bin:/bin:/sbin HOME=/root LANG=C.UTF-8
if [ -b /dev/vda ]; then mount -t ext4 /dev/vda /data; fi
sh /data/guest.sh
echo "@@DONE $?"
umount /data
sync
poweroff -f
