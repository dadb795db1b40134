"""Thin, typed wrappers over the kernel: system calls, mounts, namespaces, cgroups, capabilities, seccomp, netlink, pty. No policy."""
