# Sourced by a guest's scripts. What `run` does is in the transcript: a line with the command, its output, its exit code.
run() {
    echo "\$ $*"
    "$@" 2>&1
    code=$?
    echo
    read -r up _ </proc/uptime
    echo "-> $code at $up s"
}
state=/data/state runtime=/run/vtpm
export VTPM_MANAGER_SOCKET=$runtime/admin.sock TSS2_LOG=all+NONE
start_manager() {
    vtpm-manager run --state-dir $state --runtime-dir $runtime 2>>/data/manager.log &
    manager=$!
    for _ in $(seq 600); do
        [ -S $runtime/admin.sock ] && return 0
        kill -0 $manager || break
        sleep 0.1
    done
    tail -n 20 /data/manager.log
    return 1
}
stop_manager() {
    vtpm-manager stop --runtime-dir $runtime
    wait $manager
}
