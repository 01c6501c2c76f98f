# A TPM with command and response buffers; QEMU's has locality 0 only. Linux's driver was never loaded.
run python /data/localities.py
run python /data/registers.py
