# A reference machine: what its firmware measures.
run cat /sys/class/tpm/tpm0/pcr-sha256/1
