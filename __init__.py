"""ComfyUI entry point of the Sage3 node pack; the nodes themselves live in `nodes/`."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """Return the extension object that ComfyUI (0.3.64 and newer) registers."""
    from .nodes.extension import Sage3Extension  # noqa: PLC0415  (here, so that tests can import the root without ComfyUI)

    return Sage3Extension()
