"""The nodes of the pack, as ComfyUI asks for them."""

from comfy_api.latest import ComfyExtension, io

from .kernel_package import import_sage_kernels


class Sage3Extension(ComfyExtension):
    """What comfy_entrypoint returns."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes. Imported here: they import sage_kernels, which must be found first."""
        import_sage_kernels()
        from .demo_nodes import DEMO_NODES, register_demo_model  # noqa: PLC0415
        from .layout_route import register_layout_route  # noqa: PLC0415
        from .sage3_attention import Sage3Attention  # noqa: PLC0415
        from .sage3_calibrate import Sage3Calibrate  # noqa: PLC0415
        from .sage3_compare import Sage3Compare  # noqa: PLC0415
        from .sage3_doctor import Sage3Doctor  # noqa: PLC0415
        from .sage3_profiles import Sage3ProfileLoad, Sage3ProfileSave  # noqa: PLC0415

        register_demo_model()  # not in on_load(), which ComfyUI 0.3.64 doesn't call for node packs
        register_layout_route()
        pack = [Sage3Attention, Sage3Calibrate, Sage3Compare, Sage3Doctor, Sage3ProfileLoad, Sage3ProfileSave]
        return [*pack, *DEMO_NODES]
