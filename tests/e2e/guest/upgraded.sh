# Second boot, with new firmware: PCR 1 has changed as foreseen. Linux's driver was never loaded, so locality 0 is as
# SeaBIOS left it: active. The manager has to seize the TPM.
run ls /dev/tpm0
run start_manager
TPM2TOOLS_TCTI=swtpm:path=$(echo $runtime/vtpm/*/swtpm.sock)
export TPM2TOOLS_TCTI
run tpm2 nvread 0x1500016 -C o -s 16
run stop_manager
run grep seized /data/manager.log
run python /data/unseal.py
