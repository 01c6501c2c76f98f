# Leads a domain over its console: a line `NUMBER COMMAND` is run by the shell; the answer is a line `@@BEGIN NUMBER`,
# what the command printed (both streams), and a line `@@END NUMBER CODE`. The first answer is `@@READY UPTIME`.
# Sourced by the first process; the end of the console's input, or a command `exit`, switches the domain off.
cd /tmp
exec </dev/hvc0 >/dev/hvc0 2>&1
stty raw -echo
dmesg -n 1
read -r up rest </proc/uptime
printf '\n@@READY %s\n' "$up"
while read -r number line; do
    eval "$line" >/run/said 2>&1 </dev/null
    code=$?
    printf '\n@@BEGIN %s\n' "$number"
    cat /run/said
    printf '\n@@END %s %s\n' "$number" "$code"
done
poweroff -f
