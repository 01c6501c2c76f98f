#!/bin/sh
# What libxl runs for each disk (instead of Debian's script, which forks fifty times): "phy:" disks are block devices.
[ "$1" = add ] || exit 0
read -r device <<EOF
$(xenstore-read "$XENBUS_PATH/params")
EOF
numbers=$(stat -L -c %t:%T "$device") || {
    xenstore-write "$XENBUS_PATH/hotplug-error" "no device $device" "$XENBUS_PATH/hotplug-status" error
    exit 1
}
xenstore-write "$XENBUS_PATH/physical-device" "$numbers" "$XENBUS_PATH/physical-device-path" "$device" \
    "$XENBUS_PATH/hotplug-status" connected
