#!/bin/busybox sh
# The first process of dom0 and of our domains: loads modules, and goes over to the root disk.
# role=dom0 or role=domain stands on the kernel's command line.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
read -r line </proc/cmdline
case " $line " in *" role=dom0 "*) role=dom0 disk=vd ;; *) role=domain disk=xvd ;; esac
while read -r module; do /bin/busybox insmod "/modules/$module"; done <"/modules/$role"
/bin/busybox mkdir /new
for _ in 1 2 3 4 5 6 7 8 9; do  # front ends of disks connect when they like
    /bin/busybox mount -t ext4 -o ro "/dev/${disk}a" /new && break
    /bin/busybox sleep 0.2
done
/bin/busybox mount -t ext4 -o ro "/dev/${disk}b" /new/opt/project
/bin/busybox mount --move /dev /new/dev
/bin/busybox mount --move /proc /new/proc
exec /bin/busybox switch_root /new "/usr/sbin/$role.sh"
