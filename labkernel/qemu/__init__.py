"""The virtual machine baseline: argv, process, guest. Knows nothing of Docker's verbs."""
