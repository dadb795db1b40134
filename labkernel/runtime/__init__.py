"""The sandbox: probing, keeper, supervisor, warm pool, the init that becomes a container. Knows nothing of images."""
