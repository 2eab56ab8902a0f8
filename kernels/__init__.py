"""The ops of freemerge, one module each: what it means, a plain NumPy reference, a look-up of the fastest version."""

if (
    __name__ == "kernels"
):  # transformers probes for an unrelated distribution of this name: from the checkout's root it finds us
    __version__ = "0"
else:
    import pkgutil

    def ops() -> list[str]:
        """The names of all ops, sorted."""
        return sorted(
            m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_") and m.name not in _NOT_OPS
        )

    _NOT_OPS = {"array", "checks", "cuda", "dispatch", "triton"}
