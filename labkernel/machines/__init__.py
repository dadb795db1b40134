"""The parts of `vms`: one virtual machine, what it is to be, what came of it, its snapshots."""
