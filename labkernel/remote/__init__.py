"""An engine elsewhere, through the Docker SDK, with the objects and words of the embedded one."""
