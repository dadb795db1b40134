"""Thin, typed wrappers over the kernel's calls and files: namespaces, mounts, cgroups, seccomp, pty. No policy."""
