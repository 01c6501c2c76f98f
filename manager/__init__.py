"""The manager: the one privileged process. It owns the hardware TPM, the keys and the store."""
