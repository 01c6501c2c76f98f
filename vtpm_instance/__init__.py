"""The instance: the process that runs one vTPM (libtpms) for one guest, and the keeper that starts instances."""
