# What init runs: the script that the kernel's command line names.
for word in $(cat /proc/cmdline); do
    case $word in step=*) step=${word#step=} ;; esac
done
. /data/run.sh
. "/data/$step.sh"
true
