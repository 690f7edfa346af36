"""The nodes of the pack, as ComfyUI asks for them."""

from comfy_api.latest import ComfyExtension, io

from .kernel_package import import_sage_kernels


class Sage3Extension(ComfyExtension):
    """What comfy_entrypoint returns."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes. Imported here: they import sage_kernels, which must be found first."""
        import_sage_kernels()
        from .sage3_attention import Sage3Attention  # noqa: PLC0415

        return [Sage3Attention]
