"""OCI images: references, manifests, configs, layers and (later) registries. Knows nothing of containers."""
